"use strict";

const byId = (id) => document.getElementById(id);

/* Filters of the example list. Without this script the whole list is shown. */
const list = byId("examples");
if (list) {
  const items = Array.from(list.children).map((element) => ({
    element,
    ranks: JSON.parse(element.dataset.ranks),
    best: element.dataset.best.split(" "),
    worst: element.dataset.worst.split(" "),
    text: element.textContent.toLowerCase(),
  }));
  const [run, task, end, text] = ["run", "task", "end", "text"].map((name) => byId(`filter-${name}`));

  const fits = (item, words) => {
    const ends = { best: item.best, worst: item.worst }[end.value] ?? item.best.concat(item.worst);
    return (
      (!task.value || item.element.dataset.task === task.value) &&
      ends.includes(run.value) &&
      words.every((word) => item.text.includes(word))
    );
  };

  const update = () => {
    const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
    const direction = end.value === "worst" ? -1 : 1;
    items.sort((a, b) => direction * (a.ranks[run.value] - b.ranks[run.value]));
    let shown = 0;
    for (const item of items) {
      const fit = fits(item, words);
      item.element.hidden = !fit;
      shown += fit ? 1 : 0;
      for (const chip of item.element.querySelectorAll("[data-run]")) {
        chip.classList.toggle("current", chip.dataset.run === run.value);
      }
      list.append(item.element);
    }
    byId("filter-count").textContent = `${shown} of ${items.length}`;
    byId("nothing").hidden = shown > 0;
  };

  byId("filters").hidden = false;
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("filters").addEventListener("input", update);
  update();
}

/* Why a number is missing: on hover by its title, on a tap or key press here. */
const reason = byId("reason");
document.addEventListener("click", (event) => {
  const missing = event.target.closest(".missing");
  reason.hidden = !missing;
  reason.textContent = missing ? missing.title : "";
});

/* The section one is reading is marked in the navigation. */
const links = new Map(
  Array.from(document.querySelectorAll("nav a"), (a) => [a.getAttribute("href").slice(1), a]),
);
const watcher = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) {
      links.get(entry.target.id).classList.toggle("current", entry.isIntersecting);
    }
  },
  { rootMargin: "-25% 0px -75% 0px" },
);
for (const id of links.keys()) {
  watcher.observe(byId(id));
}
