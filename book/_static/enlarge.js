// A click or tap shows a figure at its own size, to be scrolled; another shows it whole again.
document.addEventListener("click", (event) => {
  event.target.closest?.(".cell_output img")?.classList.toggle("large");
});
