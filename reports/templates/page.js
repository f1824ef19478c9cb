"use strict";
(async () => {
  const packed = document.getElementById("packed");
  if (!packed) return;
  const LIMIT = 25, NO_LOSS = 65535, NONE = 255;
  const query = document.getElementById("query"), choice = document.getElementById("group");
  const found = document.getElementById("found"), table = document.getElementById("tokens");
  if (typeof DecompressionStream === "undefined") {
    found.textContent = "This browser is too old to unpack the token list.";
    return;
  }
  const bytes = Uint8Array.from(atob(packed.textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const data = await new Response(stream).arrayBuffer();
  const split = new Uint8Array(data).indexOf(10);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 0, split)));
  const view = new DataView(data);
  let place = split + 1;
  const take = (size) => { const start = place; place += size; return start; };
  for (const words of header.vocabularies) {
    words.folded = words.labels.map((label) => fold(label));
    words.counts = take(4 * words.labels.length);
    words.order = words.labels.map((_, i) => i).sort((a, b) => count(words, b) - count(words, a));
  }
  for (const group of header.groups) {
    group.size = header.vocabularies[group.vocabulary].labels.length;
    const cells = group.size * group.decays.length;
    group.loss = take(2 * cells);
    group.speed = take(cells);
    group.trajectory = take(cells * group.steps.length);
    group.seen = take(group.size);
    choice.add(new Option(group.name));
  }
  choice.parentElement.hidden = header.groups.length === 1;

  function fold(text) { return text.replace(/[ \u0120]/g, "\u2423").toLowerCase(); }
  // As labels have them: what cannot be seen is written out.
  function visible(text) {
    return text.replace(/(?! )[\p{C}\p{Z}]/gu, (c) => {
      const code = c.codePointAt(0), short = { 9: "\\t", 10: "\\n", 13: "\\r" }[code];
      const [letter, digits] = code < 256 ? ["x", 2] : code < 65536 ? ["u", 4] : ["U", 8];
      return short ?? `\\${letter}${code.toString(16).padStart(digits, "0")}`;
    });
  }
  function count(words, i) { return view.getUint32(words.counts + 4 * i, true); }
  function element(name, text) {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    return made;
  }
  function search(words, text) {
    if (!text) return words.order;
    const wanted = fold(visible(text)), exact = [], starts = [], holds = [];
    for (const i of words.order) {
      const label = words.folded[i], bare = label.replace(/^\u2423/, "");
      if (label === wanted || bare === wanted) exact.push(i);
      else if (label.startsWith(wanted) || bare.startsWith(wanted)) starts.push(i);
      else if (label.includes(wanted)) holds.push(i);
    }
    return exact.concat(starts, holds);
  }
  function sparkline(group, i) {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("viewBox", "0 0 100 30");
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("aria-hidden", "true");
    const last = group.steps[group.steps.length - 1], top = 20 * Math.log(group.size);
    group.decays.forEach((decay, d) => {
      const points = [];
      group.steps.forEach((step, t) => {
        const code = view.getUint8(group.trajectory + (d * group.steps.length + t) * group.size + i);
        if (code !== NONE) points.push(`${100 * step / last},${29 - 28 * Math.min(code / top, 1)}`);
      });
      const line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
      line.setAttribute("points", points.join(" "));
      line.style.stroke = `var(--wd${COLOURS.indexOf(decay)})`;
      svg.append(line);
    });
    return svg;
  }
  function row(group, words, i) {
    const made = document.createElement("tr"), head = element("th");
    head.scope = "row";
    head.append(element("code", words.labels[i]));
    const often = element("td", count(words, i).toLocaleString("en"));
    const seen = view.getUint8(group.seen + i);
    often.append(element("small", seen >= 100 ? "" : ` in ${seen} %`));
    made.append(head, often);
    group.decays.forEach((_, d) => {
      const code = view.getUint16(group.loss + 2 * (d * group.size + i), true);
      const speed = view.getUint8(group.speed + d * group.size + i);
      const cell = element("td", code === NO_LOSS ? "\u2013" : (code / 1000).toFixed(3));
      cell.append(element("small", speed === NONE ? "" : ` S ${(speed / 100).toFixed(2)}`));
      made.append(cell);
    });
    if (group.steps.length > 1) {
      const cell = element("td");
      cell.append(sparkline(group, i));
      made.append(cell);
    }
    return made;
  }
  function show() {
    const group = header.groups[Math.max(choice.selectedIndex, 0)];
    const words = header.vocabularies[group.vocabulary];
    const matches = search(words, query.value);
    const titles = ["name", "count", ...(group.columns || group.decays.map((d) => `\u03bb = ${d}`))];
    if (group.steps.length > 1) titles.push("over training");
    const line = document.createElement("tr");
    line.append(...titles.map((title) => { const cell = element("th", title); cell.scope = "col"; return cell; }));
    table.tHead.replaceChildren(line);
    table.tBodies[0].replaceChildren(...matches.slice(0, LIMIT).map((i) => row(group, words, i)));
    const total = matches.length.toLocaleString("en");
    found.textContent = matches.length === 0 ? "Nothing holds this text."
      : matches.length > LIMIT ? `${total} found, the ${LIMIT} most frequent shown.` : `${total} found.`;
  }
  const COLOURS = [...new Set(header.groups.flatMap((group) => group.decays))].sort((a, b) => a - b);
  query.addEventListener("input", show);
  choice.addEventListener("change", show);
  show();
})();
