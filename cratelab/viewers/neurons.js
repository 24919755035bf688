for (const root of document.querySelectorAll('ROOT:not([data-live])')) {
  root.dataset.live = '';
  const find = what => root.querySelector(what), data = JSON.parse(find('script').textContent);
  const [bar, pick, tabs, text, said] = ['.bar', 'select', '.tabs', '.text', '.said'].map(find);
  const heads = [...root.querySelectorAll('.head')].map(head => head.cloneNode(true));
  let part = 0;
  const make = (tag, facts, ...inside) => {
    const made = Object.assign(document.createElement(tag), facts);
    made.append(...inside);
    return made;
  };
  const excerpt = ([places, digits], max) => {
    const levels = places.map((_, i) => parseInt(digits.slice(2 * i, 2 * i + 2), 16));
    const value = level => max === null ? '?' : String(Number((level * max / 100).toPrecision(2)));
    const tokens = places.flatMap((place, i) => {
      const level = levels[i], token = make('bdi', {tabIndex: -1, title: value(level)}, data.tokens[place]);
      token.dataset.share = level;
      if (level) [token.style.background, token.style.color] = data.shades[level];
      return i ? [data.gap, token] : [token];
    });
    return make('p', {}, make('b', {title: 'highest'}, value(Math.max(...levels))), make('span', {}, ...tokens));
  };
  const buttons = data.kinds.map((kind, i) => make('button', {type: 'button', onclick: () => { part = i; show(); }}));
  const show = () => {
    const {max, parts} = data.neurons[pick.selectedIndex], chosen = parts[part] || [];
    find('.head').replaceWith(heads[pick.selectedIndex].cloneNode(true));
    buttons.forEach((button, i) => {
      button.textContent = `${data.kinds[i]} (${parts[i].length})`;
      button.setAttribute('role', 'tab');
      button.setAttribute('aria-selected', i === part);
      button.tabIndex = i === part ? 0 : -1;
    });
    text.replaceChildren(...chosen.map(one => excerpt(one, max)));
    if (!chosen.length) text.append(make('p', {}, data.none));
    text.setAttribute('aria-label', `${data.kinds[part]} excerpts`);
    text.scrollTop = 0;
    text.querySelector('bdi')?.setAttribute('tabindex', 0);
    said.textContent = 'Point at a token, or move to it with Tab and the arrow keys, to read its activation.';
  };
  const step = by => {
    pick.selectedIndex = (pick.selectedIndex + by + heads.length) % heads.length;
    show();
  };
  const say = event => {
    const {textContent: what, title, dataset} = event.target.closest('bdi') || {};
    if (dataset) said.textContent = `${what}: activation ${title}, ${dataset.share} % of the maximum`;
  };
  const arrows = (element, move) => element.addEventListener('keydown', event => {
    const by = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (by && !event.altKey && !event.ctrlKey && !event.metaKey) { event.preventDefault(); move(by, event.target); }
  });
  for (const kind of ['mouseover', 'focusin', 'click']) text.addEventListener(kind, say);
  arrows(bar, step);
  arrows(tabs, by => {
    part = (part + by + buttons.length) % buttons.length;
    show();
    buttons[part].focus();
  });
  arrows(text, (by, from) => {
    const tokens = [...text.querySelectorAll('bdi')], to = tokens[tokens.indexOf(from) + by];
    if (to) { from.tabIndex = -1; to.tabIndex = 0; to.focus(); }
  });
  const [previous, next] = bar.querySelectorAll('button');
  previous.onclick = () => step(-1);
  next.onclick = () => step(1);
  pick.onchange = show;
  tabs.append(...buttons);
  text.setAttribute('role', 'tabpanel');
  bar.hidden = heads.length < 2;
  tabs.hidden = said.hidden = false;
  if (find('.rest')) find('.rest').hidden = true;
  show();
}
