// The moving picture of the ninety points. A <div class="three-lines" data-stage="…"> gets points to turn, sliders and
// readouts, and the still picture of the cell before it is hidden, except in print. Every control starts at the stage's
// own value, or at the div's: data-noise="0.2". What is computed is in three_lines_math.js.
(() => {
  "use strict";

  const COLOURS = ["#009E73", "#CC79A7", "#E69F00"]; // cratelab.plots.PALETTE[2:5]
  const SVG = "http://www.w3.org/2000/svg";

  const slider = (name, label, from, to, step, start, show) => ({ name, label, from, to, step, start, show });
  const decimals = (digits) => (value) =>
    (Math.abs(value) < 1e4 ? value.toFixed(digits) : value.toExponential(1)).replace("-", "−");
  const degree = (value) => `${value}°`.replace("-", "−");
  const percent = (value) => `${Math.round(100 * value)} %`;
  const noise = slider("noise", "noise σ", 0, 0.4, 0.01, 0.12, decimals(2));
  const angle = slider("degrees", "angle between the lines", 10, 90, 1, 35, degree);
  const nats = (value) => `${decimals(2)(value)} nats`;
  const rate = (eps) => `(ε = ${eps})`;
  const many = (number, one, more) => `${number} ${number === 1 ? one : more}`;

  // A stage: its controls, which of them Play moves and how many milliseconds a step takes, constants that the div may
  // set, and what a state looks like: points z, lines U and whatever else is to be drawn; what it `reads`, by name;
  // what it `says` in a sentence, and a note of what is drawn.
  const STAGES = {
    denoise: {
      controls: [noise, angle, slider("way", "noisy ↔ denoised", 0, 1, 0.05, 0, percent)],
      play: ["way", 60],
      constants: { eps: 0.25 },
      note: "Hairlines lead back to the noisy points.",
      state(m, { noise, degrees, way, eps }) {
        const { z: noisy, line, U } = m.points(noise, degrees);
        const { z: clean } = m.points(0, degrees);
        const target = m.denoise(noisy, U, noise);
        const z = noisy.map((point, i) => m.plus(m.along(point, 1 - way), target[i], way));
        const error = m.squares(z.map((point, i) => m.plus(point, clean[i], -1))) / z.length;
        const parts = m.mean([0, 1, 2].map((k) => m.codingRate(z.filter((_, i) => line[i] === k), eps)));
        return {
          ...{ z, line, U, before: noisy },
          reads: {
            "mean squared distance to the clean points": decimals(4)(error),
            [`R of all points ${rate(eps)}`]: nats(m.codingRate(z, eps)),
            "R of one line's points, mean": nats(parts),
          },
          says: `near three lines, ${degrees}° apart, with noise ${noise}, moved ${percent(way)} of the way to where
            compression takes them`,
        };
      },
    },

    rate: {
      controls: [slider("eps", "precision ε", 0.05, 1, 0.05, 0.5, decimals(2)), noise, angle],
      note: "Outline: the ellipsoid of the points, made ε wider. Disc: one ball of radius ε.",
      extent: 2.1,
      state(m, { eps, noise, degrees }) {
        const { z, line, U } = m.points(noise, degrees);
        const room = m.gram(z).map((row, i) => row.map((x, j) => (3 / z.length) * x + (i === j ? eps * eps : 0)));
        const R = m.codingRate(z, eps);
        const balls = Math.exp(R);
        return {
          ...{ z, line, room, ball: eps, U },
          reads: { "rate R": nats(R), "exp R, balls": balls < 100 ? decimals(1)(balls) : decimals(0)(balls) },
          says: `near three lines, ${degrees}° apart, with noise ${noise}, in their ellipsoid, which has the volume of
            ${balls.toFixed(1)} balls of radius ${eps}`,
        };
      },
    },

    climb: {
      controls: [
        slider("steps", "step of the climb", 0, 60, 1, 0, decimals(0)),
        slider("lam", "weight of sparsity λ", 0, 0.03, 0.001, 0, decimals(3)),
        slider("eps", "precision ε", 0.1, 1, 0.05, 0.5, decimals(2)),
      ],
      play: ["steps", 100],
      note: "Black: the lines, refitted at every step. Grey: the coordinate axes.",
      state(m, { steps, lam, eps }) {
        const { z: start, line } = m.points();
        const key = `${lam} ${eps}`;
        if (this.key !== key) [this.key, this.climb] = [key, m.climb(m.normalised(start), line, { lam, eps })];
        const { z, U } = this.climb[steps];
        const [whole, parts] = [m.codingRate(z, eps), m.subspaceRate(z, U, eps)];
        return {
          ...{ z, line, U, axes: true },
          reads: {
            "R, one book": nats(whole),
            "Rᶜ, a book a line": nats(parts),
            "ΔR = R − Rᶜ": nats(whole - parts),
            "‖Z‖₁": decimals(1)(m.norm1(z)),
            "entries near zero": percent(m.nearZero(z)),
          },
          says: `of length 1 with three lines, after ${many(steps, "step", "steps")} up the rate reduction`,
        };
      },
    },

    step: {
      controls: [
        {
          ...{ name: "kind", label: "step", start: "exact" },
          options: { exact: "exact, down Rᶜ", subspaces: "softmax over subspaces", tokens: "softmax over tokens" },
        },
        slider("share", "length of a step, of the points' own", 0, 0.3, 0.01, 0.1, percent),
        slider("steps", "steps", 0, 10, 1, 0, decimals(0)),
        angle,
      ],
      play: ["steps", 500],
      constants: { eps: 0.5, noise: 0.12 },
      note: "Softmax over subspaces stops where the mean of the clean point is; softmax over tokens is MSSA with a skip, \
of points brought to length √3.",
      fit: "down",
      state(m, { kind, share, steps, degrees, eps, noise }) {
        const { z: start, line, U } = m.points(noise, degrees);
        let z = start;
        for (let step = 0; step < steps; step++) {
          if (kind === "exact") z = m.moved(z, m.subspaceRateGradient(z, U, eps), -share);
          else if (kind === "tokens") z = m.moved(z, m.mssa(m.normalised(z, Math.sqrt(3)), U), share);
          else z = m.movedTowards(z, m.denoise(z, U, noise), share);
        }
        return {
          ...{ z, line, U },
          reads: {
            "stray share": decimals(3)(m.strayShare(z, U)),
            [`Rᶜ ${rate(eps)}`]: nats(m.subspaceRate(z, U, eps)),
            "length of the points, at first 1": decimals(2)(Math.sqrt(m.squares(z) / m.squares(start))),
          },
          says: `near three lines, ${degrees}° apart, after ${many(steps, "step", "steps")} of the kind
            ${this.controls[0].options[kind]}`,
        };
      },
    },

    code: {
      controls: [
        slider("lam", "weight of sparsity λ", 0, 1, 0.02, 0.1, decimals(2)),
        slider("eta", "step size η", 0.02, 0.7, 0.02, 0.1, decimals(2)),
        slider("steps", "steps T", 1, 200, 1, 2, decimals(0)),
      ],
      play: ["steps", 50],
      constants: { noise: 0.12, degrees: 35 },
      note: "Hairlines lead from each point to what its code says of it, the dot. Rings: the six atoms. Strip: a column \
for every point, a row for every atom.",
      state(m, { lam, eta, steps, noise, degrees }) {
        const { z, line, U } = m.points(noise, degrees);
        const D = m.atoms(U);
        const code = m.ista(z, D, eta, lam, steps);
        const decoded = m.decode(code, D);
        const error = m.squares(z.map((point, i) => m.plus(point, decoded[i], -1))) / z.length;
        return {
          ...{ z: decoded, before: z, line, U, atoms: D, code },
          reads: {
            "active atoms a point, of 6": decimals(2)(m.active(code)),
            "squared error a point": decimals(3)(error),
            "objective a point": decimals(3)(m.mean(m.lassoObjective(z, code, D, lam))),
          },
          says: `as their codes of six atoms describe them, after ${many(steps, "step", "steps")} of ISTA; a point uses
            ${m.active(code).toFixed(1)} atoms`,
        };
      },
    },

    layer: {
      controls: [
        slider("layers", "layers", 0, 6, 0.5, 0, (value) => `${Math.floor(value) || (value ? "" : 0)}${value % 1 ? "½" : ""}`),
        slider("kappa", "weight of attention κ", 0, 1, 0.05, 0.3, decimals(2)),
        slider("lam", "weight of sparsity λ", 0, 1.6, 0.05, 0.1, decimals(2)),
        { name: "degrees", label: "angle between the lines", start: "35", options: { 35: "35°", 60: "60°", 90: "90°" } },
      ],
      play: ["layers", 900],
      constants: { eps: 0.5, noise: 0.12, eta: 0.1, steps: 2 },
      note: "A half layer has compressed and not yet sparsified.",
      fit: "both",
      state(m, { layers, kappa, lam, degrees, eps, noise, eta, steps }) {
        const { z: start, line, U } = m.points(noise, Number(degrees));
        const read = (z, code) => {
          const stray = m.strayShare(z, U, line);
          const L0 = code && decimals(2)(m.active(code));
          return { stray: Number.isNaN(stray) ? "none" : decimals(3)(stray), rate: decimals(2)(m.subspaceRate(z, U, eps)), L0 };
        };
        let z = start;
        let code = null;
        const rows = [[null, read(z)]];
        for (let done = 0; done < layers; done++) {
          const { half, code: sparse, full } = m.layer(z, U, { kappa, lam, stepSize: eta, steps });
          const whole = done + 1 <= layers;
          [z, code] = whole ? [full, sparse] : [half, null];
          rows.push([read(half), whole ? read(full, sparse) : null]);
        }
        const now = read(z, code);
        return {
          ...{ z, line, U, rows },
          reads: {
            "stray share": now.stray,
            [`Rᶜ ${rate(eps)}`]: `${now.rate} nats`,
            "L0, active atoms of 6": now.L0 ?? "no code yet",
          },
          says: `near three lines, ${degrees}° apart, after ${layers} layers`,
        };
      },
    },
  };

  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }

  function drawn(tag, attributes = {}, ...children) {
    const made = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }

  // Where cratelab.plots.draw_three_lines looks from, turned about the upright axis: right, up, and towards the reader.
  function seenFrom(turn) {
    const [height, way] = [(-14 * Math.PI) / 180, ((9.5 + turn) * Math.PI) / 180];
    const [sh, ch, sw, cw] = [Math.sin(height), Math.cos(height), Math.sin(way), Math.cos(way)];
    return [[-sw, cw, 0], [-sh * cw, -sh * sw, ch], [ch * cw, ch * sw, sh]];
  }

  const short = (value) => value.toFixed(4);

  // An SVG of the points, and the function that draws a state into it.
  function picture(m, stage) {
    const extent = stage.extent ?? 1.7;
    const svg = drawn("svg", { viewBox: `${-extent} ${-0.9 * extent} ${2 * extent} ${1.8 * extent}`, role: "img" });
    const layers = ["axes", "lines", "room", "trails"].map((name) => drawn("path", { class: name }));
    const ball = drawn("circle", { class: "ball", cx: 0, cy: 0, r: 0 });
    const dots = Array.from({ length: 90 }, () => drawn("circle", { r: 0.032 * (extent / 1.7) }));
    const rings = Array.from({ length: stage === STAGES.code ? 6 : 0 }, () => drawn("circle", { class: "atom", r: 0.05 }));
    const size = drawn("text", { x: -extent + 0.06, y: 0.9 * extent - 0.07 });
    const numbers = [1, 2, 3].map((k) => drawn("text", { class: "axis" }, stage === STAGES.climb ? `${k}` : ""));
    svg.append(ball, ...layers, ...dots, ...rings, ...numbers, size);

    function draw(state, turn, first) {
      const [right, up, near] = seenFrom(turn);
      const length = Math.sqrt(m.squares(state.z) / m.squares(first));
      const shrinks = stage.fit === "both" ? length > 0 : stage.fit === "down" && length > 1.05;
      const scale = shrinks ? 1 / length : 1;
      const flat = (point, factor = 1) => [factor * m.dot(point, right), -factor * m.dot(point, up)];
      const path = (from, to) => `M${from.map(short)}L${to.map(short)}`;
      const through = (direction, reach) => path(flat(direction, -reach), flat(direction, reach));
      const axes = [[1, 0, 0], [0, 1, 0], [0, 0, 1]];
      layers[0].setAttribute("d", state.axes ? axes.map((axis) => through(axis, 1.35)).join("") : "");
      layers[1].setAttribute("d", state.U.map((u) => through(u, 1.6)).join(""));
      layers[2].setAttribute("d", state.room ? outline(state.room, right, up) : "");
      const trails = (state.before ?? []).map((point, i) => path(flat(point), flat(state.z[i])));
      layers[3].setAttribute("d", trails.join(""));
      ball.setAttribute("r", state.ball ?? 0);
      const order = state.z.map((point, i) => [m.dot(point, near), i]).sort((a, b) => a[0] - b[0]);
      order.forEach(([, i], place) => {
        const [x, y] = flat(state.z[i], scale);
        dots[place].setAttribute("cx", short(x));
        dots[place].setAttribute("cy", short(y));
        dots[place].setAttribute("fill", COLOURS[state.line[i]]);
      });
      rings.forEach((ring, k) => {
        const [x, y] = flat(state.atoms[k]);
        ring.setAttribute("cx", short(x));
        ring.setAttribute("cy", short(y));
      });
      numbers.forEach((number, k) => {
        const [x, y] = flat(axes[k], 1.46);
        number.setAttribute("x", short(x));
        number.setAttribute("y", short(y + 0.04));
      });
      size.textContent = Math.abs(scale - 1) > 0.05 ? `drawn at ${scale.toPrecision(2)} times their size` : "";
      svg.setAttribute("aria-label", `Ninety points in three colours ${state.says}.`.replace(/\s+/g, " "));
    }
    return { svg, draw };
  }

  // The silhouette of the ellipsoid xᵀM⁻¹x = 1: the ellipse of M as the eye projects it.
  function outline(M, right, up) {
    const product = (a, b) => a.reduce((total, x, i) => total + x * b.reduce((row, y, j) => row + M[i][j] * y, 0), 0);
    const a = Math.sqrt(product(right, right));
    const b = product(right, up) / a;
    const c = Math.sqrt(Math.max(product(up, up) - b * b, 0));
    const corners = Array.from({ length: 96 }, (_, i) => {
      const [x, y] = [Math.cos((2 * Math.PI * i) / 96), Math.sin((2 * Math.PI * i) / 96)];
      return `${short(a * x)},${short(-(b * x + c * y))}`;
    });
    return `M${corners.join("L")}Z`;
  }

  // The codes: a column for every point, a row for every atom.
  function strip() {
    const svg = drawn("svg", { viewBox: "-5 -0.3 96 19.6", role: "img", class: "strip" });
    const cells = Array.from({ length: 6 }, (_, atom) => {
      const label = drawn("text", { x: -0.8, y: 3.2 * atom + 2.4 }, `${atom < 3 ? "" : "−"}${(atom % 3) + 1}`);
      svg.append(label);
      return Array.from({ length: 90 }, (_, i) => {
        const cell = drawn("rect", { x: i, y: 3.2 * atom, width: 1, height: 3, fill: COLOURS[atom % 3] });
        svg.append(cell);
        return cell;
      });
    });
    for (const x of [0, 30, 60, 90]) svg.append(drawn("path", { class: "border", d: `M${x},-0.3V19.3` }));
    function draw(code) {
      const most = Math.max(...code.flat(), 1e-9);
      cells.forEach((row, atom) => row.forEach((cell, i) => cell.setAttribute("fill-opacity", short(code[i][atom] / most))));
      const used = [0, 1, 2, 3, 4, 5].map((atom) => code.filter((weights) => weights[atom] > 0).length);
      svg.setAttribute("aria-label", `Codes of the ninety points; the six atoms are used by ${used.join(", ")} of them.`);
    }
    return { svg, draw };
  }

  // After each half of each layer, a row a layer.
  function table() {
    const cells = Array.from({ length: 7 }, () => Array.from({ length: 5 }, () => element("td")));
    const head = (text, span = 1) => element("th", { colspan: span, scope: span > 1 ? "colgroup" : "col" }, text);
    const rows = cells.map((row, i) => element("tr", {}, element("th", { scope: "row" }, `${i}`), ...row));
    const made = element(
      "table",
      {},
      element("thead", {}, element("tr", {}, head(""), head("compressed", 2), head("sparsified", 3)),
        element("tr", {}, ...["layer", "stray", "Rᶜ", "stray", "Rᶜ", "L0"].map((text) => head(text)))),
      element("tbody", {}, ...rows),
    );
    function draw(states) {
      cells.forEach((row, i) => {
        const [half, full] = states[i] ?? [];
        const texts = [half?.stray, half?.rate, full?.stray, full?.rate, full?.L0];
        row.forEach((cell, column) => (cell.textContent = texts[column] ?? "·"));
        rows[i].classList.toggle("now", i === states.length - 1);
      });
    }
    return { svg: element("div", { class: "rows" }, made), draw };
  }

  function control({ name, label, from, to, step, show, options }, changed) {
    const value = element("b");
    const field = options
      ? element("select", { name }, ...Object.entries(options).map(([key, text]) => element("option", { value: key }, text)))
      : element("input", { type: "range", name, min: from, max: to, step });
    field.autocomplete = "off"; // else the browser brings values back that nothing was drawn with
    field.addEventListener("input", () => changed(name));
    const made = element("label", { class: options ? "choice" : "slide" }, element("span", {}, label, " ", value), field);
    return {
      made,
      get: () => (options ? field.value : Number(field.value)),
      set(next) {
        field.value = next;
        this.tell();
      },
      tell() {
        if (options) return;
        value.textContent = show(Number(field.value));
        field.setAttribute("aria-valuetext", value.textContent);
      },
    };
  }

  function build(place, m) {
    const stage = STAGES[place.dataset.stage];
    if (!stage) throw new Error(`three-lines: no stage ${place.dataset.stage}`);
    const turn = slider("turn", "turn the view", -180, 180, 2, 0, degree);
    const asked = (name, start) => (typeof start === "number" ? Number(place.dataset[name] ?? start) : (place.dataset[name] ?? start));
    const constants = Object.fromEntries(Object.entries(stage.constants ?? {}).map(([name, start]) => [name, asked(name, start)]));
    const specs = [...stage.controls, turn];
    const controls = Object.fromEntries(specs.map((spec) => [spec.name, control(spec, changed)]));
    const now = () => ({ ...constants, ...Object.fromEntries(specs.map(({ name }) => [name, controls[name].get()])) });

    const { svg, draw } = picture(m, stage);
    const more = stage === STAGES.code ? strip() : stage === STAGES.layer ? table() : null;
    const output = element("output", { "aria-live": "polite" });
    const play = element("button", { type: "button", class: "play" }, "Play");
    const reset = element("button", { type: "button" }, "Reset");
    const buttons = element("div", { class: "buttons" }, ...(stage.play ? [play] : []), reset);
    const seen = element("div", { class: "seen" }, svg, controls.turn.made);
    const panel = element("div", { class: "panel" }, ...stage.controls.map(({ name }) => controls[name].made), buttons, output);
    const below = element("div", { class: "below" }, ...(more ? [more.svg] : []), element("small", {}, stage.note));

    const readouts = new Map();
    let first = null;
    let waiting = 0;
    function update() {
      waiting = 0;
      const state = stage.state(m, now());
      first ??= m.points(0).z;
      draw(state, controls.turn.get(), first);
      more?.draw(state.code ?? state.rows);
      for (const [name, text] of Object.entries(state.reads)) {
        if (!readouts.has(name)) {
          readouts.set(name, element("b"));
          output.append(element("span", {}, element("i", {}, name), " ", readouts.get(name), " "));
        }
        if (readouts.get(name).textContent !== text) readouts.get(name).textContent = text;
      }
    }
    function changed(name) {
      controls[name].tell();
      if (name !== "turn") pause();
      waiting ||= requestAnimationFrame(update);
    }

    let playing = 0;
    function pause() {
      clearInterval(playing);
      playing = 0;
      play.textContent = "Play";
      output.setAttribute("aria-live", "polite");
    }
    play.addEventListener("click", () => {
      if (playing) return pause();
      const [name, pace] = stage.play;
      const { from, to, step } = stage.controls.find((spec) => spec.name === name);
      if (controls[name].get() >= to) controls[name].set(from);
      if (matchMedia("(prefers-reduced-motion: reduce)").matches) {
        controls[name].set(to);
        return update();
      }
      play.textContent = "Pause";
      output.setAttribute("aria-live", "off"); // until it stands still
      update();
      playing = setInterval(() => {
        controls[name].set(controls[name].get() + step);
        if (controls[name].get() >= to) pause();
        update();
      }, pace);
    });

    function start() {
      pause();
      for (const { name, start } of specs) controls[name].set(asked(name, start));
      update();
    }
    reset.addEventListener("click", start);

    let held = null; // the view and the pointer as they were: single pixels are less than a step of the slider
    svg.addEventListener("pointerdown", (event) => {
      svg.setPointerCapture(event.pointerId);
      held = controls.turn.get() + event.clientX / 2;
    });
    svg.addEventListener("pointermove", (event) => {
      if (!svg.hasPointerCapture(event.pointerId)) return;
      const turned = held - event.clientX / 2;
      controls.turn.set(((((turned + 180) % 360) + 360) % 360) - 180);
      changed("turn");
    });

    place.setAttribute("role", "group");
    place.setAttribute("aria-label", "A picture to play with");
    place.replaceChildren(seen, panel, below);
    start();
    const before = place.previousElementSibling;
    if (before?.matches(".cell")) for (const still of before.querySelectorAll(".cell_output img")) still.classList.add("three-lines-still");
  }

  document.addEventListener("DOMContentLoaded", () => {
    for (const place of document.querySelectorAll("div.three-lines[data-stage]")) build(place, threeLines);
  });
})();
