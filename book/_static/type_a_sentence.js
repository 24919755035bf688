// Type a sentence, see its sparse codes: a toy CRATE in plain JavaScript, and the page around it.
//
// typeASentence is pure arithmetic in double precision, tested against the library (tests/test_type_a_sentence.py).
// A sequence of n vectors of width d is one Float64Array of n·d numbers, row after row. Below it is the page, where
// whatever was typed becomes text, never HTML.

const typeASentence = (() => {
  const EPS = 1e-5; // LayerNorm's
  // What parts words: Python's white space, which is not quite JavaScript's.
  const SPACE = /[\t-\r\x1c- \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+/u;
  const MARKS = /(==|[.,:?"#()[\]=])/;
  const BASE64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

  // Numbers of half precision, little-endian, in base 64.
  function halves(text) {
    const digits = new Map([...BASE64].map((letter, i) => [letter, i]));
    const bytes = [];
    for (let i = 0; i < text.length; i += 4) {
      const [a, b, c, d] = [0, 1, 2, 3].map((k) => digits.get(text[i + k]) ?? 0);
      bytes.push((a << 2) | (b >> 4), ((b & 15) << 4) | (c >> 2), ((c & 3) << 6) | d);
    }
    const count = (bytes.length - (text.endsWith("==") ? 2 : text.endsWith("=") ? 1 : 0)) / 2;
    return Float64Array.from({ length: count }, (_, i) => {
      const bits = bytes[2 * i] | (bytes[2 * i + 1] << 8);
      const [exponent, fraction] = [(bits >> 10) & 31, bits & 1023];
      const size = exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : fraction * 2 ** -24;
      return bits >> 15 ? -size : size;
    });
  }

  // A model from what book/codes_page.py wrote.
  function load(packed) {
    const numbers = halves(packed.weights);
    const tensors = {};
    let at = 0;
    for (const [name, ...shape] of packed.tensors) {
      const size = shape.reduce((product, side) => product * side, 1);
      tensors[name] = numbers.subarray(at, (at += size));
    }
    return { ...packed.config, words: packed.words, index: new Map(packed.words.map((word, i) => [word, i])), tensors };
  }

  // Words parted by white space, each with its token, or -1 where the model has none.
  function encode(model, text) {
    const words = text.split(SPACE).filter((word) => word);
    return words.map((word) => ({ word, token: model.index.get(word) ?? -1 }));
  }

  // How many letters to insert, drop, change or swap with the next to make b of a.
  function distance(a, b) {
    let [before, last] = [[], Array.from({ length: b.length + 1 }, (_, j) => j)];
    for (let i = 1; i <= a.length; i++) {
      const row = [i];
      for (let j = 1; j <= b.length; j++) {
        row[j] = Math.min(row[j - 1] + 1, last[j] + 1, last[j - 1] + (a[i - 1] !== b[j - 1]));
        if (i > 1 && j > 1 && a[i - 1] === b[j - 2] && a[i - 2] === b[j - 1]) row[j] = Math.min(row[j], before[j - 2] + 1);
      }
      [before, last] = [last, row];
    }
    return last[b.length];
  }

  // What an unknown word may have meant: itself with its punctuation set apart, then the nearest words.
  function suggest(model, word, count = 3) {
    const known = (part) => [part, part.toLowerCase()].find((form) => model.index.has(form));
    const parts = word.split(MARKS).filter((part) => part).map(known);
    const apart = parts.length && parts.every((part) => part !== undefined) ? [parts.join(" ")] : [];
    const [, stem, marks] = word.slice(0, 40).match(/^(.+?)([.,:?")\]]*)$/u) ?? [null, word.slice(0, 40), ""];
    const start = stem.toLowerCase();
    const near = model.words
      .map((each, i) => {
        const small = each.toLowerCase();
        return { each, i, far: small.startsWith(start) ? 0.5 : distance(start, small) };
      })
      .sort((a, b) => a.far - b.far || a.i - b.i);
    return [...new Set([...apart, ...near.map(({ each }) => [each, ...marks].join(" "))])].slice(0, count);
  }

  function layerNorm(x, weight, bias) {
    const [d, out] = [weight.length, new Float64Array(x.length)];
    for (let i = 0; i < x.length; i += d) {
      let [mean, variance] = [0, 0];
      for (let j = 0; j < d; j++) mean += x[i + j] / d;
      for (let j = 0; j < d; j++) variance += (x[i + j] - mean) ** 2 / d;
      const scale = 1 / Math.sqrt(variance + EPS);
      for (let j = 0; j < d; j++) out[i + j] = (x[i + j] - mean) * scale * weight[j] + bias[j];
    }
    return out;
  }

  // Each row of x (n, d) times the transpose of a matrix (m, d): (n, m).
  function times(x, matrix, d) {
    const [n, m] = [x.length / d, matrix.length / d];
    const out = new Float64Array(n * m);
    for (let i = 0; i < n; i++) {
      for (let k = 0; k < m; k++) {
        let sum = 0;
        for (let j = 0; j < d; j++) sum += x[i * d + j] * matrix[k * d + j];
        out[i * m + k] = sum;
      }
    }
    return out;
  }

  // The softmax of numbers, in place.
  function softmax(scores) {
    const top = scores.reduce((a, b) => Math.max(a, b), -Infinity);
    let sum = 0;
    for (let i = 0; i < scores.length; i++) sum += scores[i] = Math.exp(scores[i] - top);
    for (let i = 0; i < scores.length; i++) scores[i] /= sum;
    return scores;
  }

  // Multi-head subspace self-attention (eq-03-11), causal: one projection is query, key and value.
  function mssa(x, projection, output, bias, heads) {
    const d = bias.length;
    const [n, p] = [x.length / d, d / heads];
    const [w, attended] = [times(x, projection, d), new Float64Array(n * d)];
    for (let start = 0; start < d; start += p) {
      for (let i = 0; i < n; i++) {
        const scores = new Float64Array(i + 1);
        for (let j = 0; j <= i; j++) {
          for (let k = start; k < start + p; k++) scores[j] += (w[i * d + k] * w[j * d + k]) / Math.sqrt(p);
        }
        softmax(scores);
        for (let j = 0; j <= i; j++) {
          for (let k = start; k < start + p; k++) attended[i * d + k] += scores[j] * w[j * d + k];
        }
      }
    }
    return times(attended, output, d).map((value, i) => value + bias[i % d]);
  }

  // Codes (n, h) times the atoms, the rows of (h, d): tokens (n, d).
  function decode(codes, atoms, d) {
    const h = atoms.length / d;
    const out = new Float64Array((codes.length / h) * d);
    for (let at = 0; at < codes.length; at++) {
      if (codes[at] === 0) continue;
      const [row, atom] = [Math.floor(at / h) * d, (at % h) * d];
      for (let j = 0; j < d; j++) out[row + j] += codes[at] * atoms[atom + j];
    }
    return out;
  }

  // Non-negative sparse codes by a few steps of ISTA from zero (eq-04-9).
  function ista(z, atoms, d, { lam, stepSize, steps }) {
    let codes = new Float64Array((z.length / d) * (atoms.length / d));
    for (let t = 0; t < steps; t++) {
      const written = decode(codes, atoms, d);
      const pull = times(z.map((value, i) => value - written[i]), atoms, d);
      codes = codes.map((value, i) => Math.max(0, value + stepSize * pull[i] - stepSize * lam));
    }
    return codes;
  }

  // Tokens to the codes of every layer, what ISTA was given there, and the scores of the next token (eq-05-1, eq-05-2).
  function forward(model, tokens, settings) {
    const [d, of] = [model.width, (name) => model.tensors[name]];
    const [embedding, positions] = [of("token_embedding.weight"), of("position_embedding.weight")];
    let x = new Float64Array(tokens.length * d);
    for (let i = 0; i < x.length; i++) x[i] = embedding[tokens[Math.floor(i / d)] * d + (i % d)] + positions[i];
    const layers = [];
    for (let layer = 0; layer < model.n_layers; layer++) {
      const own = (name) => of(`blocks.${layer}.${name}`);
      const seen = layerNorm(x, own("attention_norm.weight"), own("attention_norm.bias"));
      const { weight, bias } = { weight: own("attention.output.weight"), bias: own("attention.output.bias") };
      const moved = mssa(seen, own("attention.projection.weight"), weight, bias, model.n_heads);
      const half = layerNorm(x.map((value, i) => value + moved[i]), own("ista_norm.weight"), own("ista_norm.bias"));
      const codes = ista(half, own("ista.weight"), d, settings);
      layers.push({ given: half, codes });
      x = decode(codes, own("ista.weight"), d);
    }
    return { layers, logits: times(layerNorm(x, of("norm.weight"), of("norm.bias")), embedding, d) };
  }

  // Nats of each token given those before it; null for the first.
  function losses(logits, tokens) {
    const v = logits.length / tokens.length;
    return tokens.map((token, i) => {
      if (i === 0) return null;
      const row = logits.subarray((i - 1) * v, i * v);
      const top = row.reduce((a, b) => Math.max(a, b), -Infinity);
      return top + Math.log(row.reduce((sum, score) => sum + Math.exp(score - top), 0)) - row[token];
    });
  }

  // A dictionary that has learned nothing: uniform entries of variance 2/d, as training starts. The same every time.
  function randomAtoms(h, d) {
    let state = 1;
    return Float64Array.from({ length: h * d }, () => {
      state = (state + 0x6d2b79f5) | 0;
      let t = Math.imul(state ^ (state >>> 15), 1 | state);
      t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
      return (2 * (((t ^ (t >>> 14)) >>> 0) / 2 ** 32) - 1) * Math.sqrt(6 / d);
    });
  }

  // How many neurons are on, a token.
  function active(codes, h) {
    const counts = Array(codes.length / h).fill(0);
    codes.forEach((value, i) => (counts[Math.floor(i / h)] += value > 0));
    return counts;
  }

  // Neurons from left to right: as numbered, by the first token at which each fires, or by its largest activation.
  function order(codes, h, by) {
    const neurons = Array.from({ length: h }, (_, i) => i);
    if (by === "number") return neurons;
    const largest = Array(h).fill(0);
    const first = Array(h).fill(Infinity);
    codes.forEach((value, i) => {
      if (value > 0 && first[i % h] === Infinity) first[i % h] = Math.floor(i / h);
      largest[i % h] = Math.max(largest[i % h], value);
    });
    const later = (a, b) => (first[a] === first[b] ? 0 : first[a] - first[b]);
    return neurons.sort((a, b) => (by === "first" && later(a, b)) || largest[b] - largest[a] || a - b);
  }

  // Places of the largest numbers, the largest first.
  const largest = (values, count) =>
    Array.from(values, (value, i) => [value, i])
      .sort((a, b) => b[0] - a[0] || a[1] - b[1])
      .slice(0, count)
      .map(([, i]) => i);

  return { load, encode, suggest, forward, ista, losses, softmax, randomAtoms, active, order, largest };
})();

// The page: fills <div class="type-a-sentence"> wherever there is one, and the model beside it.
if (typeof document !== "undefined") {
  const start = () => {
    const root = document.querySelector(".type-a-sentence");
    const packed = document.getElementById("type-a-sentence-model");
    if (root && packed) typeASentencePage(root, JSON.parse(packed.textContent));
  };
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start();
}

function typeASentencePage(root, packed) {
  const { load, encode, suggest, forward, ista, losses, softmax, randomAtoms, active, order, largest } = typeASentence;
  const model = load(packed);
  const h = model.n_neurons;
  const LAYERS = [...Array(model.n_layers).keys()];
  const [MOST, SHOWN] = [Math.min(model.context, 64), 5];
  const random = randomAtoms(h, model.width);
  const settings = { ...packed.trained };
  // What is on the screen: the text's words, tokens, what the model made of them, and what the reader chose.
  let now = null;
  const chosen = { token: "surprise", layer: 0, neuron: null };

  const make = (tag, facts = {}, ...inside) => {
    const made = document.createElement(tag);
    if ("autocomplete" in made) made.autocomplete = "off"; // else the browser brings values back that nothing was drawn with
    for (const [name, value] of Object.entries(facts)) {
      if (name in made && !name.includes("-")) made[name] = value;
      else made.setAttribute(name, value);
    }
    made.append(...inside);
    return made;
  };
  const shown = (value) => Number(value.toPrecision(3)).toString();
  const nats = (value) => value.toFixed(2);
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const wordOf = (token) => model.words[token] ?? "(no word)";
  const chip = (text) => make("b", { className: "word" }, text);

  // ---- what is built once
  const text = make("textarea", { id: "tas-text", rows: 3, spellcheck: false, autocapitalize: "off" });
  text.setAttribute("aria-describedby", "tas-unknown");
  text.value = Object.values(packed.sentences)[0];
  const samples = make("select", { id: "tas-sample" }, make("option", { value: "", textContent: "your own" }));
  for (const name of Object.keys(packed.sentences)) samples.append(make("option", { value: name, textContent: name }));
  samples.selectedIndex = 1;
  const unknown = make("div", { id: "tas-unknown", className: "unknown" });
  unknown.setAttribute("aria-live", "polite");

  const sliders = [
    { key: "lam", name: "λ", what: "price of a unit of code", min: 0, max: 3, step: 0.05, digits: 2 },
    { key: "stepSize", name: "η", what: "length of a step", min: 0.01, max: 0.3, step: 0.01, digits: 2 },
    { key: "steps", name: "T", what: "number of steps", min: 1, max: 10, step: 1, digits: 0 },
  ].map((each) => {
    const { key, name, what, min, max, step } = each;
    const input = make("input", { type: "range", id: `tas-${key}`, min, max, step, value: settings[key] });
    const value = make("output", { htmlFor: input.id, "aria-live": "off" }); // the slider says it
    const mark = make("span", { className: "trained", title: "as trained" });
    mark.style.setProperty("--share", (packed.trained[key] - min) / (max - min));
    const label = make("label", { htmlFor: input.id }, make("i", {}, name), ` ${what}`);
    const track = make("div", { className: "track" }, input, mark);
    return { ...each, input, value, box: make("div", { className: "slider" }, label, value, track) };
  });
  const reset = make("button", { type: "button", className: "reset" }, "Back to the trained values");

  const readouts = make("output", { className: "readouts" });
  readouts.setAttribute("aria-live", "polite");
  const sorting = make("select", { id: "tas-order" });
  for (const [value, name] of [["first", "first use"], ["largest", "largest activation"], ["number", "number"]]) {
    sorting.append(make("option", { value, textContent: name }));
  }
  const which = make("select", { id: "tas-layers" });
  which.append(make("option", { value: "all", textContent: "both" }));
  for (const layer of LAYERS) which.append(make("option", { value: layer, textContent: `layer ${layer + 1}` }));
  if (matchMedia("(max-width: 576px)").matches) which.value = "0";

  const body = make("tbody");
  const head = make("tr");
  const table = make("table", {}, make("caption", {}, "Codes of each word"), make("thead", {}, head), body);
  const said = make("output", { className: "said" });
  said.setAttribute("aria-live", "polite");
  const next = make("section", { className: "next" });
  const fire = make("section", { className: "fire" });

  const field = (label, control) => make("span", {}, make("label", { htmlFor: control.id }, label), " ", control);
  const words = make("details", {}, make("summary", {}, `The ${model.words.length} words that it knows`));
  words.append(make("p", { className: "words" }, model.words.join("  ")));
  root.replaceChildren(
    make("div", { className: "ask" }, make("label", { htmlFor: text.id }, "A sentence of TinyWorld"), field("from", samples)),
    text,
    unknown,
    words,
    make("div", { className: "sliders" }, ...sliders.map(({ box }) => box)),
    reset,
    readouts,
    make("div", { className: "bar" }, field("neurons by", sorting), field("show", which)),
    make("div", { className: "strips" }, table),
    said,
    make("div", { className: "panels" }, next, fire),
  );
  root.classList.add("mathjax_ignore", "tex2jax_ignore", "notranslate");
  root.setAttribute("role", "group");
  root.setAttribute("aria-label", "A toy CRATE that reads a sentence");
  document.documentElement.classList.add("type-a-sentence-live");

  // ---- what is computed anew
  function read() {
    const typed = encode(model, text.value);
    const begin = model.index.get("<begin>");
    const opens = typed[0]?.token === begin ? [] : [{ word: "<begin>", token: begin, added: true }];
    const known = [...opens, ...typed.filter(({ token }) => token >= 0)];
    const kept = known.slice(0, MOST);
    const tokens = kept.map(({ token }) => token);
    const found = measure(tokens, settings);
    const trained = now && now.tokens.join() === tokens.join() ? now.trained : measure(tokens, packed.trained).loss;
    const chance = found.layers.map(({ given }) => mean(active(ista(given, random, model.width, settings), h)));
    now = { typed, tokens, ...found, trained, chance, dropped: known.length - kept.length };
    now.scale = LAYERS.map((layer) => {
      const values = now.layers[layer].codes;
      return values.reduce((a, b) => Math.max(a, b), 0) || 1;
    });
    if (chosen.token === "surprise") chosen.token = beforeSurprise(now.each);
    if (chosen.token === null || chosen.token >= tokens.length) chosen.token = tokens.length - 1;
  }

  function measure(tokens, how) {
    const { layers, logits } = forward(model, tokens, how);
    const each = losses(logits, tokens);
    return { layers, logits, each, loss: tokens.length > 1 ? mean(each.slice(1)) : null };
  }

  // The word before the one that surprises most, in the latter half, where there is something to remember.
  function beforeSurprise(each) {
    const half = Math.floor(each.length / 2);
    return each.reduce((best, loss, i) => (i > half && loss > (each[best] ?? 0) ? i : best), half) - 1;
  }

  const codeOf = (layer, token) => now.layers[layer].codes.subarray(token * h, (token + 1) * h);

  // ---- what is drawn anew
  function showUnknown() {
    const wrong = now.typed.map((each, place) => ({ ...each, place })).filter(({ token }) => token < 0);
    const lines = wrong.slice(0, 3).map(({ word, place }) => {
      const offers = suggest(model, word).map((offer) => {
        const button = make("button", { type: "button" }, offer);
        button.onclick = () => {
          text.value = now.typed.map((each, i) => (i === place ? offer : each.word)).join(" ");
          samples.value = "";
          update();
          text.focus();
        };
        return button;
      });
      return make("p", {}, make("mark", {}, word.slice(0, 40)), " is no word of this world and is left out. Try ", ...offers);
    });
    if (wrong.length > 3) lines.push(make("p", {}, `Further words left out: ${wrong.length - 3}.`));
    if (now.dropped) lines.push(make("p", {}, `Only the first ${MOST} words are read; ${now.dropped} are left out.`));
    unknown.replaceChildren(...lines);
  }

  function showReadouts() {
    const card = (title, value, unit, below) =>
      make("span", { className: "card" }, make("span", {}, title), make("strong", {}, value, make("small", {}, ` ${unit}`)), make("span", {}, below));
    const beside = () => {
      if (now.loss === null) return "type a word";
      if (reset.disabled) return "as trained";
      const price = now.loss - now.trained;
      return `${nats(now.trained)} as trained, so ${price < 0 ? "−" : "+"}${nats(Math.abs(price))}`;
    };
    readouts.replaceChildren(
      card("Loss", now.loss === null ? "–" : nats(now.loss), "nats a word", beside()),
      ...LAYERS.map((layer) => {
        const on = mean(active(now.layers[layer].codes, h));
        return card(`Layer ${layer + 1}`, on.toFixed(0), `of ${h} on`, `random dictionary: ${now.chance[layer].toFixed(0)}`);
      }),
    );
  }

  function showTable() {
    const layers = LAYERS.filter((layer) => which.value === "all" || Number(which.value) === layer);
    const cell = (name, facts, ...inside) => make(name, facts, ...inside);
    head.replaceChildren(
      cell("th", { scope: "col" }, "word"),
      ...layers.flatMap((layer) => [
        cell("th", { scope: "col", className: "strip" }, `layer ${layer + 1}`),
        cell("th", { scope: "col", className: "number", title: `neurons on, of ${h}` }, "on"),
      ]),
      cell("th", { scope: "col", className: "number", title: "nats of this word given those before it" }, "nats"),
    );
    const counts = layers.map((layer) => active(now.layers[layer].codes, h));
    const had = body.contains(document.activeElement) ? chosen.token : null;
    body.replaceChildren(
      ...now.tokens.map((token, i) => {
        const word = make("button", { type: "button", tabIndex: i === chosen.token ? 0 : -1 }, wordOf(token));
        const row = cell("tr", {}, cell("th", { scope: "row" }, word));
        row.dataset.token = i;
        layers.forEach((layer, place) => {
          const top = largest(codeOf(layer, i), 3).filter((neuron) => codeOf(layer, i)[neuron] > 0);
          const strip = make("canvas", { height: 1, role: "img" });
          strip.setAttribute("aria-label", top.length ? `most: neurons ${top.join(", ")}` : "none fires");
          strip.dataset.layer = layer;
          row.append(cell("td", { className: "strip" }, strip), cell("td", { className: "number" }, counts[place][i]));
        });
        const loss = now.each[i];
        row.append(cell("td", { className: "number" }, loss === null ? "–" : nats(loss)));
        row.lastChild.style.setProperty("--share", Math.min(1, (loss ?? 0) / Math.log(model.words.length)));
        return row;
      }),
    );
    if (had !== null) body.children[chosen.token]?.querySelector("button").focus();
    now.order = LAYERS.map((layer) => order(now.layers[layer].codes, h, sorting.value));
    paint();
  }

  // The strips: a column a neuron, clear where it is silent, and the chosen neuron's column in another colour.
  function paint(preview = null) {
    const { layer: marked, neuron } = preview ?? chosen;
    const style = getComputedStyle(root);
    const rgb = (name) => style.getPropertyValue(name).match(/\d+/g).map(Number);
    const [on, picked, quiet] = ["--fires", "--picked", "--silent"].map(rgb);
    const first = body.querySelector("canvas");
    const wide = first ? Math.max(1, Math.ceil((first.clientWidth * devicePixelRatio) / h)) : 1;
    for (const row of body.children) {
      row.classList.toggle("chosen", Number(row.dataset.token) === chosen.token);
      for (const strip of row.querySelectorAll("canvas")) {
        const layer = Number(strip.dataset.layer);
        const values = codeOf(layer, Number(row.dataset.token));
        const image = new ImageData(h * wide, 1);
        now.order[layer].forEach((each, place) => {
          const mine = layer === marked && each === neuron;
          if (!(values[each] > 0) && !mine) return;
          const share = Math.sqrt(values[each] / now.scale[layer]);
          const colour = !mine ? on : values[each] > 0 ? picked : quiet;
          const alpha = values[each] > 0 ? 255 * (0.25 + 0.75 * share) : 90;
          for (let k = 0; k < wide; k++) image.data.set([...colour, mine && values[each] > 0 ? 255 : alpha], 4 * (place * wide + k));
        });
        strip.width = h * wide;
        strip.getContext("2d").putImageData(image, 0, 0);
      }
    }
  }

  const bar = (share) => {
    const made = make("span", { className: "share" });
    made.setAttribute("aria-hidden", "true");
    made.style.setProperty("--share", share);
    return made;
  };

  function showPanels() {
    const at = chosen.token;
    const v = model.vocab_size;
    const chances = softmax(now.logits.slice(at * v, (at + 1) * v));
    const truth = now.tokens[at + 1];
    const likely = largest(chances, SHOWN);
    const rows = [...likely, ...(truth === undefined || likely.includes(truth) ? [] : [truth])].map((token) => {
      const percent = 100 * chances[token];
      const row = make("li", {}, chip(wordOf(token)), bar(chances[token]), `${percent >= 9.95 ? percent.toFixed(0) : percent >= 0.095 ? percent.toFixed(1) : "<\u20090.1"}\u2009%`);
      if (token === truth) row.append(make("em", {}, "comes next"));
      return row;
    });
    next.replaceChildren(make("p", { className: "title" }, "After ", chip(wordOf(now.tokens[at])), " it expects"), make("ol", {}, ...rows));
    fire.replaceChildren(make("p", { className: "title" }, "Firing most at ", chip(wordOf(now.tokens[at]))));
    for (const layer of LAYERS) {
      const values = codeOf(layer, at);
      const top = largest(values, SHOWN).filter((neuron) => values[neuron] > 0);
      const items = top.map((neuron) => {
        const button = make("button", { type: "button" }, make("span", {}, String(neuron)), bar(values[neuron] / now.scale[layer]), shown(values[neuron]));
        button.setAttribute("aria-label", `layer ${layer + 1}, neuron ${neuron}, activation ${shown(values[neuron])}`);
        button.setAttribute("aria-pressed", chosen.layer === layer && chosen.neuron === neuron);
        button.onclick = () => pick({ layer, neuron });
        return make("li", {}, button);
      });
      fire.append(make("div", {}, make("p", {}, `layer ${layer + 1}`), make("ol", {}, ...(items.length ? items : [make("li", {}, "none")]))));
    }
  }

  function say({ token, layer, neuron }) {
    if (neuron === null) {
      said.textContent = "Point at a strip, tap it, or choose a word and press ← → to go from neuron to neuron.";
      return;
    }
    const at = now.tokens.map((_, i) => [codeOf(layer, i)[neuron], i]).filter(([value]) => value > 0);
    const most = [...new Set(at.sort((a, b) => b[0] - a[0]).map(([, i]) => wordOf(now.tokens[i])))].slice(0, 3);
    said.replaceChildren(
      `Layer ${layer + 1}, neuron ${neuron}: ${shown(codeOf(layer, token)[neuron])} at `,
      chip(wordOf(now.tokens[token])),
      at.length ? `. It fires at ${at.length} of ${now.tokens.length} words here, most at ` : ". It is silent in this sentence.",
      ...most.flatMap((word, i) => (i ? [", ", chip(word)] : [chip(word)])),
    );
  }

  function pick(choice) {
    const focused = fire.contains(document.activeElement) ? document.activeElement.getAttribute("aria-label") : null;
    Object.assign(chosen, choice);
    for (const row of body.children) row.querySelector("button").tabIndex = Number(row.dataset.token) === chosen.token ? 0 : -1;
    paint();
    showPanels();
    say(chosen);
    if (focused) [...fire.querySelectorAll("button")].find((each) => each.getAttribute("aria-label") === focused)?.focus();
  }

  function update() {
    for (const { key, input, value, name, digits } of sliders) {
      settings[key] = Number(input.value);
      value.textContent = settings[key].toFixed(digits);
      input.setAttribute("aria-valuetext", `${name} ${value.textContent}${settings[key] === packed.trained[key] ? ", as trained" : ""}`);
    }
    reset.disabled = sliders.every(({ key }) => settings[key] === packed.trained[key]);
    read();
    showUnknown();
    showReadouts();
    showTable();
    showPanels();
    say(chosen);
  }

  let waiting = 0;
  const soon = () => {
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(update);
  };

  // ---- what the reader does
  text.addEventListener("input", () => {
    samples.value = "";
    chosen.token = null;
    soon();
  });
  samples.addEventListener("change", () => {
    if (samples.value) text.value = packed.sentences[samples.value];
    chosen.token = "surprise";
    soon();
  });
  for (const { input } of sliders) input.addEventListener("input", soon);
  reset.addEventListener("click", () => {
    for (const { key, input } of sliders) input.value = packed.trained[key];
    update();
    sliders[0].input.focus();
  });
  sorting.addEventListener("change", () => showTable());
  which.addEventListener("change", () => showTable());

  // The neuron under a point of a strip: of those within four pixels that fire, the nearest.
  const under = (event) => {
    const strip = event.target.closest("canvas");
    if (!strip) return null;
    const layer = Number(strip.dataset.layer);
    const token = Number(strip.closest("tr").dataset.token);
    const { left, width } = strip.getBoundingClientRect();
    const place = ((event.clientX - left) / width) * h - 0.5;
    const near = now.order[layer]
      .map((neuron, i) => ({ neuron, away: Math.abs(i - place) }))
      .filter(({ neuron, away }) => away <= 0.5 || (away * width <= 4 * h && codeOf(layer, token)[neuron] > 0))
      .sort((a, b) => (codeOf(layer, token)[b.neuron] > 0) - (codeOf(layer, token)[a.neuron] > 0) || a.away - b.away);
    return near.length ? { token, layer, neuron: near[0].neuron } : null;
  };
  body.addEventListener("pointermove", (event) => {
    const found = event.pointerType === "mouse" && under(event);
    if (found) {
      paint(found);
      say(found);
    }
  });
  body.addEventListener("pointerleave", () => {
    paint();
    say(chosen);
  });
  body.addEventListener("click", (event) => {
    const row = event.target.closest("tr");
    if (row) pick(under(event) ?? { token: Number(row.dataset.token) });
  });
  body.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const by = { ArrowUp: -1, ArrowDown: 1, ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by) return;
    event.preventDefault();
    if (event.key === "ArrowUp" || event.key === "ArrowDown") {
      pick({ token: Math.min(now.tokens.length - 1, Math.max(0, chosen.token + by)) });
      body.children[chosen.token].querySelector("button").focus();
      return;
    }
    const firing = LAYERS.filter((layer) => which.value === "all" || Number(which.value) === layer).flatMap((layer) =>
      now.order[layer].filter((neuron) => codeOf(layer, chosen.token)[neuron] > 0).map((neuron) => ({ layer, neuron })),
    );
    const from = firing.findIndex(({ layer, neuron }) => layer === chosen.layer && neuron === chosen.neuron);
    const to = firing[from < 0 ? (by > 0 ? 0 : firing.length - 1) : (from + by + firing.length) % firing.length];
    if (to) pick(to);
  });
  addEventListener("resize", () => paint());
  new MutationObserver(() => paint()).observe(document.documentElement, { attributeFilter: ["data-theme"] });
  update();
}
