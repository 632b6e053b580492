(function draw(attempt, id, figure) {
  const box = document.getElementById(id);
  if (!box || !window.Plotly) {
    // an output above may still be loading Plotly, or may be gone
    if (attempt === 50 && box) box.textContent = "Plotly's script is missing: whichkl.plot(…) draws this picture.";
    if (attempt < 3000) setTimeout(() => draw(attempt + 1, id, figure), 100);
    return;
  }
  box.textContent = "";
  const layout = { ...figure.layout, autosize: true };
  layout.font = { ...layout.font, color: getComputedStyle(box).color };
  if (layout.meta && layout.meta.square) layout.height = Math.min(layout.height, box.clientWidth);
  box.style.height = `${layout.height}px`;
  if (box.clientWidth < 480) layout.font.size = 11;
  window.Plotly.newPlot(box, figure.data, layout, { responsive: true, displaylogo: false, displayModeBar: false });
})
