// Filters and search; without JavaScript all codewords are shown.
const cards = [...document.querySelectorAll('.card')];
const chips = [...document.querySelectorAll('.chips a')];
const buttons = [...document.querySelectorAll('[data-show]')];
const search = document.getElementById('search');
let group = '';

function isFound(card, asked) {
  if (group && card.dataset.group !== group) return false;
  if (asked.startsWith('#')) return card.dataset.number === asked.slice(1);
  return card.textContent.toLowerCase().includes(asked);
}

function show() {
  const asked = search.value.trim().toLowerCase();
  let count = 0;
  cards.forEach((card, place) => {
    card.hidden = chips[place].hidden = !isFound(card, asked);
    count += !card.hidden;
  });
  document.getElementById('count').textContent = `${count} codeword${count === 1 ? '' : 's'}`;
}

for (const button of buttons) {
  button.addEventListener('click', () => {
    group = button.dataset.show;
    buttons.forEach((one) => one.setAttribute('aria-pressed', one === button));
    show();
  });
}
search.addEventListener('input', show);
document.getElementById('filters').hidden = false;
show();
