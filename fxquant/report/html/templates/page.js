"use strict";
(() => {
  const root = document.documentElement;
  const by = (id) => document.getElementById(id);
  root.classList.remove("nojs");
  by("theme").addEventListener("click", () => {
    const dark = root.dataset.theme
      ? root.dataset.theme === "dark"
      : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });
  const search = by("search");
  const count = by("count");
  const rows = [...document.querySelectorAll("tr[data-q]")];
  const svg = by("graph");
  if (!svg) {
    search.addEventListener("input", () => {
      const words = search.value.toLowerCase();
      let found = 0;
      for (const row of rows) {
        const fits = row.dataset.q.includes(words);
        row.classList.toggle("off", !fits);
        found += fits ? 1 : 0;
      }
      count.textContent = words ? `${found} of ${rows.length} rows` : "";
    });
    return;
  }
  const number = (node, key) => Number(node.dataset[key]);
  const GAP = number(svg, "gap"), WIDE = number(svg, "wide"), LANE = number(svg, "lane");
  const LEFT = number(svg, "left"), ASIDE = number(svg, "aside");
  const all = [...svg.querySelectorAll("g.b")];
  const blocks = all.filter((g) => g.dataset.i !== undefined);
  const pills = all.filter((g) => g.dataset.i === undefined);
  const edges = [...svg.querySelectorAll("path.e")].map((path) => {
    const [s, t, lane] = path.dataset.e.split(" ").map(Number);
    return { path, s, t, lane, kind: path.classList[1] };
  });
  const open = new Set();
  const pillOf = new Map(pills.map((g) => [g.dataset.r, g]));
  const folded = (g) => g.dataset.r !== undefined && !open.has(g.dataset.r);
  const shownFor = (g) => (folded(g) ? pillOf.get(g.dataset.r) : g);
  const at = new Map();

  function place() {
    const height = new Map();
    for (const g of all) {
      const pill = g.dataset.i === undefined;
      const off = pill ? open.has(g.dataset.r) : folded(g);
      g.classList.toggle("off", off);
      if (!off) {
        const layer = number(g, "l");
        height.set(layer, Math.max(height.get(layer) || 0, number(g, "h")));
      }
    }
    let y = 10, row = 0;
    const top = new Map(), order = new Map();
    for (const layer of [...height.keys()].sort((a, b) => a - b)) {
      top.set(layer, y);
      order.set(layer, row++);
      y += height.get(layer) + GAP;
    }
    at.clear();
    for (const g of all) {
      if (g.classList.contains("off")) continue;
      const layer = number(g, "l"), x = number(g, "x");
      g.setAttribute("transform", `translate(${x},${top.get(layer)})`);
      at.set(g, { x: x + WIDE / 2, y: top.get(layer), end: top.get(layer) + number(g, "h"), floor: top.get(layer) + height.get(layer), row: order.get(layer) });
    }
    const drawn = new Set();
    for (const edge of edges) {
      const source = shownFor(blocks[edge.s]), target = shownFor(blocks[edge.t]);
      const key = `${source.id}>${target.id}>${edge.kind}`;
      const off = source === target || drawn.has(key);
      drawn.add(key);
      edge.path.classList.toggle("off", off);
      if (off) continue;
      const a = at.get(source), b = at.get(target);
      if (b.row === a.row + 1) {
        const half = (b.y - a.floor) / 2;
        edge.path.setAttribute("d", `M${a.x} ${a.end}V${a.floor}C${a.x} ${a.floor + half} ${b.x} ${b.y - half} ${b.x} ${b.y - 2}`);
      } else {
        const lane = Math.max(0, edge.lane), k = 7 + (lane % 3) * 3;
        const x = LEFT - LANE * (lane + 1);
        edge.path.setAttribute("d", `M${a.x - ASIDE} ${a.end}V${a.floor + k}H${x}V${b.y - k}H${b.x - ASIDE}V${b.y - 2}`);
      }
    }
    svg.setAttribute("height", y);
    svg.setAttribute("viewBox", `0 0 ${number(svg, "w")} ${y}`);
  }

  const side = by("panel");
  let current = null;
  function select(g, scroll) {
    if (!g) return;
    if (current) { current.classList.remove("on"); current.setAttribute("tabindex", "-1"); }
    current = g;
    g.classList.add("on");
    g.setAttribute("tabindex", "0");
    g.focus({ preventScroll: true });
    if (scroll) g.scrollIntoView({ block: "center", inline: "nearest" });
    for (const edge of edges) {
      const touches = g === shownFor(blocks[edge.s]) || g === shownFor(blocks[edge.t]);
      edge.path.classList.toggle("on", touches);
    }
    const from = g.dataset.i === undefined ? null : by(`d${g.dataset.i}`);
    if (from) {
      side.replaceChildren(...[...from.childNodes].map((node) => node.cloneNode(true)));
      if (g.dataset.r !== undefined) {
        const again = document.createElement("button");
        again.textContent = "Fold this unchanged run again";
        again.addEventListener("click", () => { open.delete(g.dataset.r); place(); select(pillOf.get(g.dataset.r), true); });
        side.append(again);
      }
    }
  }
  function unfold(g) {
    open.add(g.dataset.r);
    place();
    select(blocks.find((other) => other.dataset.r === g.dataset.r), true);
  }
  const act = (g) => (g.dataset.i === undefined ? unfold(g) : select(g, false));
  for (const g of all) g.addEventListener("click", () => act(g));
  const visible = () => all.filter((g) => !g.classList.contains("off"))
    .sort((p, q) => at.get(p).row - at.get(q).row || at.get(p).x - at.get(q).x);
  const next = (list, step) => {
    const here = current ? list.indexOf(current) : -1;
    if (here < 0) return list[step > 0 ? 0 : list.length - 1];
    return list[Math.min(list.length - 1, Math.max(0, here + step))];
  };
  const changes = () => visible().filter((g) => g.dataset.c && !g.classList.contains("dim"));
  let hits = [];
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target === search) {
      if (event.key === "Enter") { event.preventDefault(); select(next(hits.filter((g) => !g.classList.contains("off")), event.shiftKey ? -1 : 1), true); search.focus(); }
      if (event.key === "Escape") { search.value = ""; look(); svg.focus(); }
      return;
    }
    const inside = event.target.closest && event.target.closest("#graph");
    if (event.key === "/") { event.preventDefault(); search.focus(); return; }
    if (event.key === "n" || event.key === "p") { event.preventDefault(); select(next(changes(), event.key === "n" ? 1 : -1), true); return; }
    if (!inside) return;
    if (event.key === "ArrowDown" || event.key === "ArrowRight") { event.preventDefault(); select(next(visible(), 1), true); }
    if (event.key === "ArrowUp" || event.key === "ArrowLeft") { event.preventDefault(); select(next(visible(), -1), true); }
    if ((event.key === "Enter" || event.key === " ") && current) { event.preventDefault(); act(current); }
  });
  function look() {
    const words = search.value.trim().toLowerCase();
    hits = words ? blocks.filter((g) => g.dataset.q.includes(words)) : [];
    const found = new Set(hits);
    for (const g of blocks) g.classList.toggle("hit", found.has(g));
    let unfolded = false;
    if (hits.length && hits.length <= 60) {
      for (const g of hits) if (folded(g)) { open.add(g.dataset.r); unfolded = true; }
    }
    if (unfolded) place();
    count.textContent = words ? `${hits.length} of ${blocks.length} blocks` : "";
    if (hits.length) shownFor(hits[0]).scrollIntoView({ block: "center", inline: "nearest" });
  }
  search.addEventListener("input", look);
  by("unfold").addEventListener("click", () => { for (const g of pills) open.add(g.dataset.r); place(); });
  by("fold").addEventListener("click", () => { open.clear(); place(); });
  const filters = [...document.querySelectorAll("button[data-kind]")];
  for (const button of filters) {
    button.addEventListener("click", () => {
      button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") !== "true"));
      const kinds = filters.filter((b) => b.getAttribute("aria-pressed") === "true").map((b) => b.dataset.kind);
      for (const g of all) g.classList.toggle("dim", kinds.length > 0 && !kinds.includes(g.dataset.c || ""));
    });
  }
  place();
})();
