"use strict";
document.documentElement.classList.add("has-script");

const root = document.documentElement;
const isDark = () =>
  root.dataset.theme
    ? root.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
document.getElementById("theme").addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
});

document.getElementById("sections").append(
  ...[...document.querySelectorAll("main section > h2")].map((title) => {
    const link = document.createElement("a");
    link.href = `#${title.parentElement.id}`;
    link.textContent = title.textContent;
    return link;
  }),
);

const form = document.getElementById("filter");
if (form) {
  const rows = [...document.querySelectorAll("#modules tbody tr")];
  const count = document.getElementById("filter-count");
  const update = () => {
    const words = form.elements.text.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      const isShown =
        words.every((word) => text.includes(word)) &&
        ["status", "op"].every((key) => ["", row.dataset[key]].includes(form.elements[key].value));
      row.hidden = !isShown;
      shown += isShown;
    }
    count.textContent = `${shown} of ${rows.length} rows`;
  };
  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  update();
}

// What is folded away cannot be unfolded on paper.
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});
