"use strict";
// Everything here is added to a page that shows all that it has without it: filters, sorting, keys, larger pictures.
(() => {
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const named = (id) => document.getElementById(id);
  const seen = (element) => element.getClientRects().length > 0;
  const bar = named("bar"), words = named("words"), task = named("task"), metric = named("metric");

  // Filter: a part is shown where its task, its metric and every word fit; what holds no shown part goes too.
  const parts = all("[data-task]");
  function filter() {
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const part of parts) {
      const of = part.dataset;
      const text = `${of.task} ${of.metric ?? ""} ${of.label ?? ""}`.toLowerCase();
      const fits = (!task.value || of.task === task.value) && (!metric.value || !of.metric || of.metric === metric.value);
      part.hidden = !(fits && wanted.every((word) => text.includes(word)));
    }
    for (const holder of all("[data-holds]")) {
      holder.hidden = all("[data-task]", holder).every((part) => part.hidden);
    }
    const shown = parts.filter((part) => !part.hidden).length;
    named("found").textContent = shown === parts.length ? "" : shown ? `${shown} of ${parts.length} parts` : "nothing of this name";
    all(".gallery").forEach(rove);
  }
  function clear() {
    words.value = task.value = metric.value = "";
    filter();
  }
  words.addEventListener("input", filter);
  for (const choice of [task, metric]) choice.addEventListener("change", filter);
  named("clear").addEventListener("click", clear);

  // Sort: by one column over all groups of a table; the third press brings its own order back.
  for (const table of all("table[data-sorted]")) {
    const homes = [...table.tBodies].map((body) => [body, all("tr:not(.group)", body)]);
    const rows = homes.flatMap(([, own]) => own);
    const heads = all("thead th", table);
    const sorted = table.createTBody();
    const value = (row, column) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
    const order = (column, down) => (one, other) => {
      const [a, b] = [value(one, column), value(other, column)];
      const missing = (text) => text === "" || text === "–";
      if (missing(a) || missing(b)) return missing(a) - missing(b); // last either way
      const less = one.cells[column].dataset.value === undefined ? a.localeCompare(b) : Number(a) - Number(b);
      return down ? -less : less;
    };
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      head.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => {
        const numbers = rows.some((row) => row.cells[column].dataset.value !== undefined);
        const turns = numbers ? ["none", "descending", "ascending"] : ["none", "ascending", "descending"];
        const next = turns[(turns.indexOf(head.getAttribute("aria-sort")) + 1) % 3];
        for (const other of heads) other.setAttribute("aria-sort", other === head ? next : "none");
        table.classList.toggle("sorted", next !== "none");
        if (next === "none") homes.forEach(([body, own]) => body.append(...own));
        else sorted.append(...[...rows].sort(order(column, next === "descending")));
        filter();
      });
    });
  }

  // Pictures: one of each gallery can be reached by Tab, arrows walk from it, Enter, Space or a click enlarges it.
  const large = named("large");
  let shown = null;
  const pictures = () => all(".gallery img").filter(seen);
  function rove(gallery) {
    const own = all("img", gallery);
    const first = own.find((picture) => picture.tabIndex === 0 && seen(picture)) ?? own.find(seen);
    for (const picture of own) picture.tabIndex = picture === first ? 0 : -1;
  }
  function enlarge(picture) {
    shown = picture;
    const near = pictures();
    const score = picture.parentElement.querySelector(".score")?.textContent ?? "";
    const why = picture.closest("tr").dataset.why ?? "";
    large.querySelector("img").src = picture.src;
    large.querySelector("img").alt = picture.alt;
    large.querySelector("img").className = picture.className;
    large.querySelector("figcaption").textContent = [picture.alt, score, why].filter(Boolean).join(" · ");
    large.querySelector("output").textContent = `${near.indexOf(picture) + 1} of ${near.length}`;
    if (!large.open) large.showModal();
  }
  function neighbour(picture, key) {
    const near = pictures(), step = { ArrowRight: 1, ArrowLeft: -1 }[key];
    if (step) return near[near.indexOf(picture) + step];
    const rows = all(".gallery tr").filter((row) => all("img", row).some(seen));
    const row = rows[rows.indexOf(picture.closest("tr")) + { ArrowDown: 1, ArrowUp: -1 }[key]];
    const column = picture.closest("td").cellIndex;
    return row && (row.cells[column]?.querySelector("img") ?? row.querySelector("img"));
  }
  function walk(event, from, go) {
    if (!event.key.startsWith("Arrow")) return false;
    event.preventDefault();
    const next = neighbour(from, event.key);
    if (next) go(next);
    return true;
  }
  function reach(picture) {
    all("img", picture.closest(".gallery")).forEach((other) => (other.tabIndex = other === picture ? 0 : -1));
    picture.focus();
  }
  for (const picture of all(".gallery img")) {
    picture.setAttribute("role", "button");
    picture.setAttribute("aria-haspopup", "dialog");
    picture.addEventListener("click", () => enlarge(picture));
    picture.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        enlarge(picture);
      } else walk(event, picture, reach);
    });
  }
  large.addEventListener("keydown", (event) => walk(event, shown, enlarge));
  // The event comes a moment after it has closed: who is in the field by then stays there.
  large.addEventListener("close", () => document.activeElement === words || reach(shown));
  for (const [id, key] of [["earlier", "ArrowLeft"], ["later", "ArrowRight"]]) {
    named(id).addEventListener("click", () => enlarge(neighbour(shown, key) ?? shown));
  }
  for (const dialog of all("dialog")) {
    // A press beside it, on its backdrop, closes it.
    dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
    all("[data-close]", dialog).forEach((button) => button.addEventListener("click", () => dialog.close()));
  }

  // Keys.
  function step(by) {
    const heads = all("main > section > h2").filter(seen);
    const below = heads.findIndex((head) => head.getBoundingClientRect().top > bar.offsetHeight + 40);
    const focused = heads.indexOf(document.activeElement);
    const here = focused >= 0 ? focused : (below < 0 ? heads.length : below) - 1;
    const next = heads[Math.max(0, Math.min(heads.length - 1, here + by))];
    if (!next) return;
    next.tabIndex = -1;
    next.focus({ preventScroll: true });
    next.parentElement.scrollIntoView();
  }
  const seek = () => {
    words.focus();
    words.select();
  };
  const help = () => named("keys").showModal();
  const actions = { "/": seek, f: seek, j: () => step(1), k: () => step(-1), "?": help };
  named("help").addEventListener("click", help);
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
    if (event.target.closest?.("input, select")) {
      if (event.key !== "Escape") return;
      clear();
      event.target.blur();
    } else if (Object.hasOwn(actions, event.key)) {
      event.preventDefault();
      actions[event.key]();
    }
  });

  bar.hidden = false;
  filter();
})();
