import re
import subprocess
import sys
from importlib import resources

import pytest

from cratelab.viewers.frame import fragment


def test_no_viewer_loads_matplotlib():
    code = "import sys, cratelab.viewers.neurons, cratelab.viewers.steering; print('matplotlib' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"


@pytest.mark.parametrize("kind", ["neurons", "steering"])
def test_style_and_script_act_on_one_viewer_alone(kind):
    one, other = (fragment(kind, "a {label}", "<p>{body}</p>", "{}", "#123456", made_of) for made_of in ("a", ["a"]))
    (name,) = re.findall(f'^<div class="({kind}-[0-9a-f]{{10}}) ', one)
    assert name not in other and "ROOT" not in one and "COLOUR" not in one
    rules = (resources.files("cratelab.viewers") / f"{kind}.css").read_text(encoding="utf8")
    style = one[one.index("<style>") + 7 : one.index("</style>")]
    assert style == "\n" + rules.replace("ROOT", f".{name}").replace("COLOUR", "#123456")
    assert f"querySelectorAll('.{name}:not([data-live])')" in one and "<p>{body}</p>" in one
