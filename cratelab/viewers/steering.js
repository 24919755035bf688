for (const root of document.querySelectorAll('ROOT:not([data-live])')) {
  root.dataset.live = '';
  const find = what => root.querySelector(what), data = JSON.parse(find('script').textContent);
  const [neuron, prompt, slider, says] = ['.neuron', '.prompt', 'input', 'output'].map(find);
  const join = places => places.map(place => data.tokens[place]).join(data.gap);
  const make = (tag, facts, ...inside) => {
    const made = Object.assign(document.createElement(tag), facts);
    made.append(...inside);
    return made;
  };
  const show = () => {
    const p = prompt.selectedIndex, step = data.neurons[neuron.selectedIndex].steps[slider.value];
    const [tokens, percent, marks] = step.next[p];
    says.textContent = data.strengths[slider.value];
    slider.setAttribute('aria-valuetext', says.textContent);
    find('.given').replaceChildren(make('bdi', {}, join(data.prompts[p])));
    find('.goes').replaceChildren(make('bdi', {}, join(step.text[p])));
    find('.next').replaceChildren(...tokens.map((token, i) => {
      const bar = make('i', {});
      bar.style.width = `${percent[i]}%`;
      const value = make('span', {}, `${percent[i]} %`), name = make('bdi', {}, data.tokens[token]);
      return make('div', {className: marks[i] ? 'target' : ''}, name, make('span', {}, bar), value);
    }));
    const all = make('i', {}), mass = step.mass[p];
    all.style.width = `${mass}%`;
    find('.next').append(make('div', {className: 'target all'}, make('bdi', {}, 'all targets'),
      make('span', {}, all), make('span', {}, `${mass} %`)));
    find('.facts').textContent = `Over all contexts: lift of the targets (bold) ${step.lift} nats, ` +
      `off-target divergence ${step.off} nats.`;
  };
  for (const control of [neuron, prompt, slider]) control.addEventListener('input', show);
  for (const part of root.querySelectorAll('.bar,.next,.facts')) part.hidden = false;
  find('.tables').hidden = true;
  show();
}
