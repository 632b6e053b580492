"use strict";
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const tones = () => (dark.matches ? { ink: "#c3cad6", grid: "rgba(255,255,255,.10)" } : { ink: "#4a5263", grid: "rgba(20,30,50,.10)" });
const charts = [...document.querySelectorAll(".chart")].map((box) => {
  const figure = JSON.parse(box.querySelector("script").textContent);
  box.textContent = "";
  return { box, figure };
});
function paint({ box, figure }) {
  const { ink, grid } = tones();
  const layout = { ...figure.layout, font: { ...figure.layout.font, color: ink }, autosize: true };
  for (const key of Object.keys(layout)) {
    if (/^[xy]axis/.test(key)) layout[key] = { ...layout[key], gridcolor: grid };
  }
  if (layout.meta && layout.meta.square) layout.height = Math.min(layout.height, box.clientWidth);
  if (box.clientWidth < 480) layout.font.size = 11;
  Plotly.react(box, figure.data, layout, { responsive: true, displaylogo: false, displayModeBar: false });
}
charts.forEach(paint);
dark.addEventListener("change", () => charts.forEach(paint));
document.documentElement.dataset.ready = "true";
