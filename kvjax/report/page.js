"use strict";
(() => {
  const root = document.documentElement;
  root.classList.add("js");

  // Light and dark: what the reader chose, else what the system says.
  const system = matchMedia("(prefers-color-scheme: dark)");
  const button = document.getElementById("theme");
  const remembered = { get: () => { try { return localStorage.getItem("kvjax-theme"); } catch { return null; } },
                       set: (theme) => { try { localStorage.setItem("kvjax-theme", theme); } catch { /* a page may not store */ } } };
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const name = () => { button.querySelector("span").textContent = dark() ? "light" : "dark"; };
  if (["light", "dark"].includes(remembered.get())) root.dataset.theme = remembered.get();
  button.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    remembered.set(root.dataset.theme);
    name();
  });
  system.addEventListener("change", name);
  name();
  // Paper is white, whatever the screen was.
  let shown;
  addEventListener("beforeprint", () => { shown = root.dataset.theme; root.dataset.theme = "light"; });
  addEventListener("afterprint", () => { if (shown) root.dataset.theme = shown; else delete root.dataset.theme; });

  // Tables: a click on a head sorts by it, another turns it around; what is missing stays last.
  const worth = (cell, numeric) => {
    const text = cell.textContent.trim();
    if (text === "–") return null;
    return numeric ? (text === "∞" ? Infinity : parseFloat(text.replaceAll(",", ""))) : text;
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => head.addEventListener("click", () => {
      const numeric = head.classList.contains("n");
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...table.tBodies[0].rows].map((row) => [worth(row.cells[column], numeric), row]);
      rows.sort(([a], [b]) => {
        if (a === null || b === null) return (a === null) - (b === null);
        const order = numeric ? (a === b ? 0 : a - b) : a.localeCompare(b, "en", { numeric: true });
        return down ? -order : order;
      });
      table.tBodies[0].append(...rows.map(([, row]) => row));
    }));
  }

  // Filter: every word has to stand in the row; a strategy that is switched off is not shown.
  for (const box of document.querySelectorAll(".records")) {
    const input = box.querySelector("input");
    if (!input) continue;
    const rows = [...box.querySelectorAll("tbody tr")].map((row) => [row, [...row.cells].map((cell) => cell.textContent).join(" ").toLowerCase()]);
    const chips = [...box.querySelectorAll(".chip")];
    const apply = () => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      const off = new Set(chips.filter((chip) => chip.getAttribute("aria-pressed") === "false").map((chip) => chip.dataset.s));
      let count = 0;
      for (const [row, text] of rows) {
        row.hidden = off.has(row.dataset.s) || !words.every((word) => text.includes(word));
        count += !row.hidden;
      }
      box.querySelector("output").textContent = (count === rows.length ? "" : `${count} of `) + `${rows.length} cell${rows.length === 1 ? "" : "s"}`;
    };
    input.addEventListener("input", apply);
    for (const chip of chips) chip.addEventListener("click", () => {
      chip.setAttribute("aria-pressed", chip.getAttribute("aria-pressed") === "true" ? "false" : "true");
      apply();
    });
  }

  // Commands: copy, by the clipboard or, where a page has none, by a selection.
  for (const copy of document.querySelectorAll(".copy")) copy.addEventListener("click", async () => {
    const code = copy.previousElementSibling;
    let done = true;
    try {
      await navigator.clipboard.writeText(code.textContent);
    } catch {
      getSelection().selectAllChildren(code);
      done = document.execCommand("copy");
    }
    copy.textContent = done ? "copied" : "selected";
    setTimeout(() => { copy.textContent = "copy"; }, 1600);
  });

  // Contents: open beside the text, closed above it; the section being read is marked.
  const contents = document.getElementById("contents");
  const narrow = matchMedia("(max-width: 60rem)");
  const fold = () => { contents.open = !narrow.matches; };
  narrow.addEventListener("change", fold);
  fold();
  const links = new Map([...contents.querySelectorAll("a")].map((link) => [link.hash.slice(1), link]));
  const seen = new Set();
  const watch = new IntersectionObserver((entries) => {
    for (const entry of entries) seen[entry.isIntersecting ? "add" : "delete"](entry.target);
    const first = [...document.querySelectorAll("main > section")].find((section) => seen.has(section));
    for (const [id, link] of links) link.classList.toggle("here", first !== undefined && id === first.id);
  }, { rootMargin: "-10% 0px -60% 0px" });
  for (const section of document.querySelectorAll("main > section")) watch.observe(section);
})();
