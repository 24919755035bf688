"""The moving picture of the ninety points: its numbers are the library's, and it works in a browser."""

import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from javascript import engine
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from notebooks import BOOK

import cratelab as cl
from cratelab import plots
from cratelab.three_lines import three_lines

STATIC = BOOK / "_static"
Z, LINE, BASES = three_lines()
LINES = BASES[:, :, 0]
# Points at other lengths than the library's own, of which some lie far from every line.
AWAY = Z * torch.linspace(0.3, 3, 90, dtype=torch.float64)[:, None] + torch.tensor([0.1, -0.4, 0.2])
CLOUDS = pytest.mark.parametrize("z", [Z, AWAY], ids=["the points", "others"])
MATH = engine(STATIC / "three_lines_math.js")


def page(name, *arguments, **options):
    """What the page computes; tensors go there and lists come back."""
    plain = [x.tolist() if isinstance(x, torch.Tensor) else x for x in arguments]
    return MATH.call(f"threeLines.{name}", *plain, *([options] if options else []))


def same(found, expected, atol=1e-9, rtol=1e-9):
    found = torch.as_tensor(found, dtype=torch.float64)
    np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=atol, rtol=rtol)


@pytest.mark.parametrize(("noise", "degrees"), [(0.12, 35), (0, 35), (0.4, 90), (0.3, 10)])
def test_the_points_are_the_librarys(noise, degrees):
    found = page("points", noise, degrees)
    z, line, U = three_lines(noise, degrees)
    same(found["z"], z, atol=0.6e-4 * noise + 1e-12)  # the page's noise has four decimals
    same(found["U"], U[:, :, 0], atol=1e-12)
    assert found["line"] == line.tolist()


@CLOUDS
@pytest.mark.parametrize("eps", [0.05, 0.5, 1])
def test_rates_and_gradients(z, eps):
    same(page("codingRate", z, eps), cl.coding_rate(z, eps))
    same(page("codingRateGradient", z, eps), cl.coding_rate_gradient(z, eps))
    same(page("subspaceRate", z, LINES, eps), cl.subspace_rate(z, BASES, eps))
    same(page("subspaceRateGradient", z, LINES, eps), cl.subspace_rate_gradient(z, BASES, eps))
    same(page("compressionStep", z, LINES, 9.5, eps), cl.compression_step(z, BASES, 9.5, eps))


def test_eigenvectors():
    matrices = [Z.mT @ Z, AWAY.mT @ AWAY, torch.diag(torch.tensor([3.0, 1.0, 2.0])), torch.ones(3, 3), torch.eye(3)]
    for matrix in matrices:
        found = page("eigen", matrix)
        values, vectors = (torch.tensor(found[name], dtype=torch.float64) for name in ("values", "vectors"))
        matrix = matrix.double()
        same(vectors @ vectors.mT, torch.eye(3))
        same(vectors.mT @ values.diag() @ vectors, matrix, atol=1e-9 * float(matrix.norm()))


def fitted(z, group, U):
    """Chapter 2's: the best line through each group, (k, d, 1); one without tokens stays."""
    U = U.clone()
    for k in range(len(U)):
        if (group == k).any():
            U[k] = torch.linalg.svd(z[group == k], full_matrices=False).Vh[:1].T
    return U


def climb(z, lam, eps, steps, step_size=1.8):
    """Chapter 2's climb with refitted lines."""
    U = fitted(z, LINE, torch.zeros(3, 3, 1, dtype=torch.float64))
    for _ in range(steps + 1):
        yield z, U
        z = z + step_size * (cl.coding_rate_gradient(z, eps) - cl.subspace_rate_gradient(z, U, eps))
        z = z.sign() * (z.abs() - step_size * lam).clamp(min=0)
        z = F.normalize(z, dim=-1)
        U = fitted(z, (z @ U.squeeze(-1).T).abs().argmax(-1), U)


@pytest.mark.parametrize(("lam", "eps"), [(0, 0.5), (0.01, 0.5), (0.03, 0.2), (0.001, 1)])
def test_the_climb_is_that_of_chapter_2(lam, eps):
    start = F.normalize(Z, dim=-1)
    same(page("normalised", Z), start)
    found = page("climb", start, LINE, steps=60, lam=lam, eps=eps)
    for step, (z, U) in enumerate(climb(start, lam, eps, 60)):
        atol = 1e-9 * 1.3**step  # a point near a tie magnifies rounding, step by step
        same(found[step]["z"], z, atol=min(atol, 1e-5))
        U = U[:, :, 0]
        lines = torch.tensor(found[step]["U"], dtype=torch.float64)
        same((lines * U).sum(-1).abs(), torch.ones(3, dtype=torch.float64), atol=min(atol, 1e-5))
    same(page("norm1", z), z.abs().sum())
    same(page("nearZero", z), (z.abs() < 1e-3).double().mean())
    assert len(found) == 61


def test_a_line_without_points_stays():
    group = torch.zeros(90, dtype=torch.long)
    same(page("fitted", Z, group, LINES)[1], LINES[1], atol=0)


@CLOUDS
@pytest.mark.parametrize("sigma", [0.02, 0.12, 0.4])
def test_the_denoiser_is_tweedies(z, sigma):
    """The posterior mean is z + σ² ∇ log p(z), with p the mixture's density, by PyTorch's own distributions."""
    covariances = LINES[:, :, None] * LINES[:, None] + sigma**2 * torch.eye(3, dtype=torch.float64)
    parts = torch.distributions.MultivariateNormal(torch.zeros(3, dtype=torch.float64), covariances)
    z = z.clone().requires_grad_()
    log_densities = parts.log_prob(z[:, None])
    (score,) = torch.autograd.grad(log_densities.logsumexp(-1).sum(), z)
    same(page("denoise", z, LINES, sigma), (z + sigma**2 * score).detach(), atol=1e-8)
    same(page("membership", z, LINES, sigma), log_densities.softmax(-1).detach(), atol=1e-8)


def test_without_noise_there_is_nothing_to_remove():
    same(page("denoise", Z, LINES, 0), Z, atol=0)


@CLOUDS
def test_softmax_over_tokens(z):
    same(page("mssa", z, LINES), cl.mssa(z, BASES))


def test_a_step_is_as_long_as_said():
    moved = torch.tensor(page("moved", Z, AWAY, 0.3), dtype=torch.float64)
    same(moved, Z + 0.3 * Z.norm() * AWAY / AWAY.norm())
    same(page("moved", Z, 0 * Z, 0.3), Z, atol=0)


def test_a_step_towards_a_target_does_not_pass_it():
    way = AWAY - Z
    target = Z + 0.2 * way * Z.norm() / way.norm()
    same(page("movedTowards", Z, target, 0.15), Z + 0.75 * (target - Z))
    same(page("movedTowards", Z, target, 0.25), target, atol=0)


@CLOUDS
def test_stray_share(z):
    own = cl.project(z, BASES).square()[LINE, torch.arange(90), 0]
    expected = (1 - own / z.square().sum(-1)).mean()
    same(page("strayShare", z, LINES, LINE), expected)
    same(page("strayShare", torch.cat([z, torch.zeros(1, 3)]), LINES, [*LINE.tolist(), 0]), expected)
    strongest = cl.project(z, BASES).square().sum(-1).amax(0)
    same(page("strayShare", z, LINES), (1 - strongest / z.square().sum(-1)).mean())


@CLOUDS
@pytest.mark.parametrize(("step_size", "lam", "steps"), [(0.1, 0.1, 2), (0.18, 0.5, 50), (0.3, 0, 5), (0.1, 0.1, 1)])
def test_sparse_codes(z, step_size, lam, steps):
    D = torch.cat([LINES, -LINES]).mT
    same(page("atoms", LINES), D.mT)
    code = cl.ista(z, D, step_size, lam, steps)
    same(found := page("ista", z, D.mT, step_size, lam, steps), code)
    same(page("decode", found, D.mT), code @ D.mT)
    same(page("lassoObjective", z, found, D.mT, lam), cl.lasso_objective(z, code, D, lam))
    same(page("active", found), (code != 0).double().sum(-1).mean())


@pytest.mark.parametrize(("kappa", "lam"), [(0.3, 0.1), (1, 1), (0, 0)])
def test_a_layer(kappa, lam):
    D = torch.cat([LINES, -LINES]).mT
    half = Z + kappa * cl.mssa(math.sqrt(3) * F.normalize(Z, dim=-1), BASES)
    code = cl.ista(math.sqrt(3) * F.normalize(half, dim=-1), D, 0.1, lam)
    found = page("layer", Z, LINES, kappa=kappa, lam=lam)
    same(found["half"], half)
    same(found["code"], code)
    same(found["full"], code @ D.mT)


def test_the_colours_are_the_palettes():
    (colours,) = re.findall(r"const COLOURS = (\[.*\]);", (STATIC / "three_lines.js").read_text(encoding="utf8"))
    assert json.loads(colours) == plots.PALETTE[2:5]


STAGES = {  # states in which every control matters
    "denoise": {"way": 0.6},
    "rate": {},
    "climb": {"steps": 20, "lam": 0.01},
    "step": {"steps": 1, "kind": "tokens"},
    "code": {"steps": 5},
    "layer": {"layers": 2},
}
CELL = """<div class="cell"><div class="cell_output"><img alt="a still picture"
src="data:image/gif;base64,R0lGODlhAQABAAAAACw="></div></div><div class="three-lines" {}></div>"""
UP, RIGHT, DOWN = "\ue013", "\ue014", "\ue015"  # the arrow keys, as WebDriver names them
FRAME = "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(done))"
STATE = "return [...document.querySelectorAll('[data-stage=step] :is(input, select)')].map(field => field.value)"
SET = """const field = document.querySelector(arguments[0]); field.value = arguments[1];
field.dispatchEvent(new Event('input'))"""


@pytest.fixture(scope="module")
def driver(check_pages, tmp_path_factory):
    """A browser that shows all stages, and one more with values of its own."""
    folder = tmp_path_factory.mktemp("page")
    for file in ("three_lines.js", "three_lines_math.js", "three_lines.css", "custom.css"):
        shutil.copy(STATIC / file, folder)
    head = '<!doctype html><meta charset="utf8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += '<link rel="icon" href="data:,"><style>body { margin: 16px }</style>'
    head += "".join(f'<link rel="stylesheet" href="{name}.css">' for name in ("custom", "three_lines"))
    # as Sphinx may: the page's script before the mathematics
    head += "".join(f'<script src="{name}.js"></script>' for name in ("three_lines", "three_lines_math"))
    asked = 'id="asked" data-stage="denoise" data-noise="0.3" data-eps="0.1"'
    places = [f'data-stage="{stage}"' for stage in STAGES] + [asked]
    body = "".join(CELL.format(place) for place in places)
    body += "".join(f"<details{kind}><summary>Fold</summary><p>Text.</p></details>" for kind in ("", ' class="hide"'))
    (folder / "index.html").write_text(f'{head}<article class="bd-content">{body}</article>', encoding="utf8")
    with check_pages.served(folder) as address, check_pages.browser() as driver:
        driver.get(f"{address}/index.html")
        yield driver
        problems = [entry["message"] for entry in driver.get_log("browser")]
        problems += check_pages.network_problems(driver, address.removeprefix("http://"))
        assert problems == []


def shown(driver, stage):
    """What stage's output says, and where its points are."""
    driver.execute_async_script(FRAME)
    return driver.execute_script(
        """const place = document.querySelector(`[data-stage=${arguments[0]}]`);
        return [place.querySelector('output').textContent, place.querySelector('.seen svg').ariaLabel,
            [...place.querySelectorAll('.seen circle[fill]')].map(dot =>
                [dot.getAttribute('fill'), Number(dot.getAttribute('cx')), -Number(dot.getAttribute('cy'))])]""",
        stage,
    )


def reset(driver, stage):
    driver.find_element("css selector", f"[data-stage={stage}] .buttons button:last-child").click()


@pytest.mark.parametrize("stage", STAGES)
def test_every_control_changes_the_picture_and_the_keyboard_moves_it(driver, stage):
    reset(driver, stage)
    fresh = shown(driver, stage)
    assert "NaN" not in fresh[0] and fresh[1].startswith("Ninety points") and len(fresh[2]) == 90
    place = f"[data-stage={stage}]:not(#asked)"
    for name, value in STAGES[stage].items():
        driver.execute_script(SET, f"{place} [name={name}]", value)
    before = shown(driver, stage)
    fields = driver.find_elements("css selector", f"{place} :is(input, select)")
    sliders = [field for field in fields if field.tag_name == "input"]
    assert 3 <= len(sliders) <= 4
    for field in fields:
        assert driver.execute_script("return arguments[0].labels[0].textContent.trim()", field)
        field.send_keys(UP if field.get_attribute("value") == "tokens" else RIGHT)
        after = shown(driver, stage)
        if field.get_attribute("name") == "turn":
            assert after[0] == before[0] and after[2] != before[2]
        else:
            assert after[0] != before[0], field.get_attribute("name")
        if field.tag_name == "input":
            assert driver.execute_script("return arguments[0].previousSibling.lastChild.textContent", field)
        before = after
    reset(driver, stage)
    assert shown(driver, stage) == fresh


def test_points_are_where_the_still_picture_has_them(driver):
    reset(driver, "denoise")
    axes = Figure().add_subplot()
    plots.draw_three_lines(axes, Z, LINE)
    groups = [(to_hex(group.get_facecolor()[0]).upper(), group) for group in axes.collections]
    still = [(colour, *place) for colour, group in groups for place in group.get_offsets()]
    live = shown(driver, "denoise")[2]
    for (colour, *place), (expected, *there) in zip(sorted(live), sorted(still), strict=True):
        assert colour == expected
        np.testing.assert_allclose(place, there, atol=2e-4)


def test_a_chapter_may_set_where_a_control_starts(driver):
    read = "return document.querySelector('#asked').textContent"
    assert "noise σ 0.30" in driver.execute_script(read) and "ε = 0.1)" in driver.execute_script(read)


def test_play_moves_on_and_stops_where_the_reader_says(driver):
    reset(driver, "step")
    steps, play = (driver.find_element("css selector", f"[data-stage=step] {x}") for x in ("[name=steps]", ".play"))
    play.click()
    assert play.text == "Pause"
    wait = "const [field, done] = arguments; const look = () => field.value > 0 ? done() : setTimeout(look, 20); look()"
    driver.execute_async_script(wait, steps)
    play.click()
    assert play.text == "Play" and int(steps.get_attribute("value")) < 10
    reset(driver, "step")
    still = {"features": [{"name": "prefers-reduced-motion", "value": "reduce"}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", still)
    play.click()
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert play.text == "Play" and steps.get_attribute("value") == "10"


@pytest.mark.parametrize("pixels", [1, -1, 2, -2, 40, -40])
def test_the_view_turns_as_far_as_the_pointer_goes_however_slowly(driver, pixels):
    from selenium.webdriver import ActionChains

    reset(driver, "step")
    svg = driver.find_element("css selector", "[data-stage=step] .seen svg")
    drag = ActionChains(driver, duration=0).click_and_hold(svg)
    for _ in range(80 // abs(pixels)):
        drag.move_by_offset(pixels, 0)
    drag.release().perform()
    turn = driver.find_element("css selector", "[data-stage=step] [name=turn]")
    assert int(turn.get_attribute("value")) == (-40 if pixels > 0 else 40)


def test_who_comes_back_finds_sliders_and_pictures_at_one(driver):
    reset(driver, "step")
    for field in driver.find_elements("css selector", "[data-stage=step] :is(input, select)"):
        field.send_keys(DOWN if field.tag_name == "select" else RIGHT)
    driver.execute_script("addEventListener('unload', () => 0)")  # else the browser may keep the page as it is
    driver.get("about:blank")
    driver.back()
    assert driver.execute_script("return performance.getEntriesByType('navigation')[0].type") == "back_forward"
    came_back = shown(driver, "step"), driver.execute_script(STATE)
    reset(driver, "step")
    assert came_back == (shown(driver, "step"), driver.execute_script(STATE))


def test_words_in_a_picture_can_be_read(driver):
    fills = driver.execute_script(
        """return [...document.querySelectorAll('.three-lines svg text')].filter(e => e.textContent)
            .map(e => getComputedStyle(e).fill.match(/\\d+/g).map(Number))"""
    )
    linear = (np.array(fills) / 255 + 0.055) ** 2.4 / 1.055**2.4  # WCAG's, for all but the darkest
    assert len(fills) >= 9 and (1.05 / (linear @ [0.2126, 0.7152, 0.0722] + 0.05)).min() >= 4.5


def test_answers_are_printed_and_code_stays_folded(driver):
    look = "return [...document.querySelectorAll('details p')].map(e => e.checkVisibility())"
    assert driver.execute_script(look) == [False, False]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    printed = driver.execute_script(look)
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert printed == [True, False]


def test_the_still_picture_is_for_print_only(driver):
    look = """const shows = e => getComputedStyle(e).display !== 'none';
        const count = kind => [...document.querySelectorAll(kind)].filter(shows).length;
        return ['.cell_output img', '.three-lines'].map(count)"""
    assert driver.execute_script(look) == [0, len(STAGES) + 1]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    printed = driver.execute_script(look)
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert printed == [len(STAGES) + 1, 0]


@pytest.mark.parametrize("size", [(390, 900), (1200, 900)])
def test_nothing_is_wider_than_the_screen(driver, check_pages, size):
    with check_pages.screen(driver, size):
        assert driver.execute_script("return document.documentElement.scrollWidth") <= size[0]
        assert driver.execute_script(check_pages.READ_WIDTH, size[0]) == []
