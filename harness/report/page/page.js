"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);

/** An element with properties and children; text children are always escaped. */
function make(tag, properties = {}, ...children) {
  const svg = ["svg", "g", "line", "circle", "rect", "path", "text", "polygon", "title", "polyline"].includes(tag);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

const there = (value) => value !== null && value !== undefined;
const shown = (value, digits = 1) => (there(value) ? value.toFixed(digits) : "–");
const options = (select, entries) =>
  select.replaceChildren(...entries.map(([value, text]) => make("option", { value }, text)));

// ---- leaderboard

const columns = [["average", "average of score / vanilla, %"], ...data.columns.map((c) => [c.name, c.title])];
const partsOf = { task: "Tasks", regime: "Scenes (regime)", kind: "Kinds of question" };
const state = { sort: null, down: true };

/** [value, low, high] of a row in the chosen column, or null. */
const chosen = (row, column) =>
  row[column] === null || row[column] === undefined ? null : [row[column], row[column + "_low"], row[column + "_high"]];
const block = () => data.blocks[Number($("budget").value) || 0];

function visibleRows() {
  const where = $("where").value;
  return block().rows.filter(
    (row) =>
      row.role === "reference" ||
      ((row.role === "method" || $("controls").checked) && (!where || row.role !== "method" || row.where === where)),
  );
}

const facts = [
  ["group", "Group", (r) => r.group || ""],
  ["kept", "Tokens kept", (r) => shown(r.kept) + (r.kept_std > 0.05 ? " ± " + shown(r.kept_std) : "")],
  ["mean_over_layers", "mean", (r) => shown(r.mean_over_layers)],
  ["gflops_ratio", "FLOPs", (r) => (there(r.gflops_ratio) ? shown(r.gflops_ratio, 2) + "×" : "–")],
  ["speedup", "Speed-up", (r) => (there(r.speedup) ? shown(r.speedup, 2) + "×" : "–")],
  ["hard", "Hard", (r) => shown(r.hard)],
  ["recall", "Evidence", (r) => shown(r.recall)],
  ["recall_alone", "unmerged", (r) => shown(r.recall_alone)],
  ["equal_cost", "Equal cost", (r) => (there(r.equal_cost) ? `${shown(r.equal_cost)} @ ${Number(r.equal_cost_budget)}` : "–")],
  ["capped", "Cut", (r) => shown(r.capped, 0)],
];
const titles = {
  group: "methods that share a letter cannot be told apart",
  kept: "visual tokens that enter the last layer, ± standard deviation over the questions",
  mean_over_layers: "visual tokens, mean over the layers of the language model",
  gflops_ratio: "FLOPs of one prefill, vision tower included, against no pruning",
  speedup: "measured prefill, against no pruning",
  hard: "% right of the questions that no pruning gets right and downsampling at this budget gets wrong",
  recall: "% of the patches that hold the answer which reached the last layer, by themselves or merged into another token",
  recall_alone: "% of the patches that hold the answer which reached the last layer by themselves",
  equal_cost: "average at the budget (behind the @) whose prefill costs what keeping this many tokens before the language model does (--match flops)",
  capped: "answers cut at the limit of new tokens",
};

function drawBoard() {
  const column = $("column").value;
  const rows = visibleRows();
  const used = facts.filter(([key]) => rows.some((r) => there(r[key]) && r[key] !== ""));
  const key = state.sort || "value";
  const valueOf = (row) => {
    if (key === "value") return (chosen(row, column) || [-Infinity])[0];
    if (key === "method") return row.method;
    return row[key] ?? -Infinity;
  };
  rows.sort((a, b) => {
    if ((a.role === "reference") !== (b.role === "reference")) return a.role === "reference" ? -1 : 1;
    const [x, y] = [valueOf(a), valueOf(b)];
    const order = x < y ? -1 : x > y ? 1 : a.method < b.method ? -1 : 1;
    return state.down && key !== "method" ? -order : order;
  });
  const bounds = rows.flatMap((row) => chosen(row, column) || []).filter(there);
  const low = Math.min(...bounds), high = Math.max(...bounds), span = high - low || 1;
  const head = (name, text, title) =>
    make(
      "th",
      {
        "data-sort": name, title, scope: "col",
        "aria-sort": key === name ? (state.down && name !== "method" ? "descending" : "ascending") : null,
        onclick: () => {
          state.down = state.sort === name ? !state.down : true;
          state.sort = name;
          drawBoard();
        },
      },
      text,
    );
  const unit = column === "average" ? "Average %" : columns.find(([name]) => name === column)[1];
  const header = make(
    "tr", {},
    head("method", "Method"), head("value", unit), make("th", { scope: "col" }, "95 % interval"),
    ...used.map(([name, text]) => head(name, text, titles[name])),
  );
  const body = rows.map((row) => {
    const value = chosen(row, column);
    const strip = make("div", { class: "strip" });
    if (value && there(value[1])) {
      const place = (v) => `${(100 * (v - low)) / span}%`;
      strip.append(
        make("i", { style: `left:${place(value[1])};width:${(100 * (value[2] - value[1])) / span}%` }),
        make("b", { style: `left:${place(value[0])}` }),
      );
      strip.title = `${shown(value[1])} to ${shown(value[2])}`;
    }
    const name = make("td", {}, row.method + (row.note ? " †" : ""));
    if (row.where !== "none") name.append(make("span", { class: "where" }, row.where === "inside" ? "  in the LLM" : ""));
    if (row.note) name.title = row.note;
    if (row.failed.length) name.append(make("span", { class: "failed" }, "  failed: " + row.failed.join(", ")));
    return make(
      "tr", { class: row.role === "answer key" ? "key" : row.role, "data-method": row.method },
      name, make("td", {}, shown(value && value[0])), make("td", { class: "interval" }, strip),
      ...used.map(([, , text]) => make("td", {}, text(row))),
    );
  });
  $("board").replaceChildren(make("thead", {}, header), make("tbody", {}, ...body));
  drawPairs();
}

function drawPairs() {
  const pairs = block().pairs;
  $("pairs-box").hidden = !pairs;
  if (!pairs) return;
  const header = make("tr", {}, make("th", {}, ""), ...pairs.methods.map((m) => make("th", { scope: "col" }, m)));
  const body = pairs.methods.map((own, i) =>
    make(
      "tr", {}, make("td", {}, own),
      ...pairs.methods.map((other, j) => {
        const entry = pairs.cells[i][j];
        if (!entry) return make("td", {}, "");
        const [difference, low, high, p, sure] = entry;
        return make(
          "td",
          { class: sure ? "sure" : null, title: `${own} − ${other}: ${shown(low)} to ${shown(high)}, p ${p.toPrecision(2)} (Holm)` },
          (difference > 0 ? "+" : "") + shown(difference),
        );
      }),
    ),
  );
  $("pairs").replaceChildren(make("thead", {}, header), make("tbody", {}, ...body));
}

// ---- accuracy against cost

const shapes = ["circle", "square", "triangle", "diamond", "down", "cross"];
function marker(shape, x, y, colour) {
  const path = {
    square: `M${x - 5} ${y - 5}h10v10h-10z`, triangle: `M${x} ${y - 6}l6 11h-12z`, diamond: `M${x} ${y - 7}l7 7l-7 7l-7 -7z`,
    down: `M${x} ${y + 6}l6 -11h-12z`, cross: `M${x - 6} ${y - 2}h4v-4h4v4h4v4h-4v4h-4v-4h-4z`,
  }[shape];
  return path ? make("path", { d: path, fill: colour }) : make("circle", { cx: x, cy: y, r: 5.5, fill: colour });
}
/** A colour that no other method has, readable on light and dark ground. */
const colourOf = (index, count) => `hsl(${Math.round((360 * index) / count)} ${index % 2 ? 55 : 75}% ${index % 3 ? 45 : 58}%)`;

/** Round numbers between the ends, at most `most` of them. */
function ticks(low, high, most) {
  const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((f) => f * power).find((s) => s >= rough);
  const found = [];
  for (let v = Math.ceil(low / step) * step; v <= high; v += step) found.push(Number(v.toPrecision(6)));
  return found;
}

function drawPlot() {
  const axis = $("axis").value;
  const methods = [...new Set(data.blocks.flatMap((b) => b.rows.map((r) => r.method)))];
  const points = data.blocks
    .flatMap((b) => b.rows.map((row) => ({ row, label: b.label })))
    .filter(({ row }) => there(row[axis]) && there(row.average));
  const box = $("plot");
  if (!points.length) { box.replaceChildren(make("p", { class: "fine" }, "Nothing to draw: no method has both an average and this cost.")); return; }
  const narrow = box.clientWidth && box.clientWidth < 600;
  const W = narrow ? 420 : 820, H = narrow ? 380 : 440, left = 56, right = narrow ? 12 : 150, top = 16, bottom = 46;
  const xs = points.map((p) => p.row[axis]), ys = points.flatMap((p) => chosen(p.row, "average")).filter(there);
  const pad = (lo, hi) => [lo - 0.05 * (hi - lo || 1), hi + 0.05 * (hi - lo || 1)];
  const [x0, x1] = pad(Math.min(...xs), Math.max(...xs)), [y0, y1] = pad(Math.min(...ys), Math.max(...ys));
  const X = (v) => left + ((W - left - right) * (v - x0)) / (x1 - x0), Y = (v) => H - bottom - ((H - top - bottom) * (v - y0)) / (y1 - y0);
  const svg = make("svg", { viewBox: `0 0 ${W} ${H}` });
  const tip = make("div", { class: "tip", hidden: true });
  for (const x of ticks(x0, x1, narrow ? 4 : 7)) {
    svg.append(
      make("line", { class: "axis", x1: X(x), x2: X(x), y1: top, y2: H - bottom }),
      make("text", { class: "soft", x: X(x), y: H - bottom + 16, "text-anchor": "middle" }, String(x)),
    );
  }
  for (const y of ticks(y0, y1, 6)) {
    svg.append(
      make("line", { class: "axis", x1: left, x2: W - right, y1: Y(y), y2: Y(y) }),
      make("text", { class: "soft", x: left - 6, y: Y(y) + 4, "text-anchor": "end" }, String(y)),
    );
  }
  svg.append(
    make("text", { x: left + (W - left - right) / 2, y: H - 8, "text-anchor": "middle" }, $("axis").selectedOptions[0].text),
    make("text", { x: 14, y: H / 2, "text-anchor": "middle", transform: `rotate(-90 14 ${H / 2})` }, "average of score / vanilla, %"),
  );
  const front = points
    .filter((p) => p.row.role !== "answer key" && !points.some((q) => q !== p && q.row.role !== "answer key" && q.row[axis] <= p.row[axis] && q.row.average >= p.row.average && (q.row[axis] < p.row[axis] || q.row.average > p.row.average)))
    .sort((a, b) => a.row[axis] - b.row[axis]);
  svg.append(make("polyline", { class: "front", points: front.map((p) => `${X(p.row[axis])},${Y(p.row.average)}`).join(" ") }));
  for (const { row, label } of points) {
    const index = methods.indexOf(row.method), colour = colourOf(index, methods.length);
    const [x, y] = [X(row[axis]), Y(row.average)];
    const group = make(
      "g",
      {
        "data-method": row.method, tabindex: 0,
        onmouseenter: show, onfocus: show, onclick: show, onmouseleave: () => (tip.hidden = true), onblur: () => (tip.hidden = true),
      },
      make("line", { x1: x, x2: x, y1: Y(row.average_low ?? row.average), y2: Y(row.average_high ?? row.average), stroke: colour, "stroke-opacity": 0.55, "stroke-width": 1.5 }),
      marker(row.role === "reference" ? "cross" : shapes[index % 5], x, y, colour),
    );
    function show() {
      tip.hidden = false;
      tip.textContent = `${row.method}${row.role === "reference" ? "" : ", " + label}\n${shown(row.average)} % (${shown(row.average_low)} to ${shown(row.average_high)})\n${shown(row.prefill)} ms · ${shown(row.gflops, 2)} GFLOP · ${shown(row.mean_over_layers)} tokens`;
      const scale = svg.getBoundingClientRect().width / W;
      tip.style.left = `${Math.min(x * scale + 10, box.clientWidth - 200)}px`;
      tip.style.top = `${y * scale + 10}px`;
    }
    svg.append(group);
  }
  const keys = methods.filter((m) => points.some((p) => p.row.method === m));
  const shapeOf = (m) => (points.find((p) => p.row.method === m).row.role === "reference" ? "cross" : shapes[methods.indexOf(m) % 5]);
  const cut = (m) => (m.length > 18 ? m.slice(0, 17) + "…" : m);
  if (!narrow) {
    keys.forEach((m, i) => {
      const y = top + 10 + 19 * i;
      svg.append(
        marker(shapeOf(m), W - right + 22, y, colourOf(methods.indexOf(m), methods.length)),
        make("text", { x: W - right + 34, y: y + 4 }, cut(m)),
      );
    });
  }
  const legend = make("p", { class: "legend" }, ...(narrow ? keys : []).map((m) =>
    make("span", {}, make("svg", { viewBox: "0 0 16 16", width: 14, height: 14 }, marker(shapeOf(m), 8, 8, colourOf(methods.indexOf(m), methods.length))), cut(m))));
  box.replaceChildren(svg, legend, tip);
}

// ---- explorer

/** Places as `packed` in Python wrote them; -1 for one that is none. */
function unpacked(text) {
  if (!there(text)) return null;
  const width = Number(text[0]), found = [];
  for (let i = 1; i < text.length; i += width) found.push(text[i] === "." ? -1 : parseInt(text.slice(i, i + width), 36));
  return found;
}
for (const question of data.questions)
  for (const answer of Object.values(question.answers)) {
    answer.kept = unpacked(answer.kept);
    answer.merged = unpacked(answer.merged);
  }

const explorer = { list: [], at: 0, method: null };

function filtered() {
  const right = $("right").value, wrong = $("wrong").value, task = $("task").value;
  const regime = $("regime") ? $("regime").value : "", kind = $("kind") ? $("kind").value : "";
  const is = (question, method, ok) => !method || (question.answers[method] && question.answers[method].score >= 0.5 === ok);
  return data.questions.filter(
    (q) =>
      is(q, right, true) && is(q, wrong, false) && (!task || q.task === task) && (!regime || q.regime === regime) &&
      (!kind || q.kind === kind),
  );
}

function refilter(id = null) {
  explorer.list = filtered();
  explorer.at = Math.max(0, explorer.list.findIndex((q) => q.id === id));
  drawQuestion();
}

function drawQuestion() {
  const { list } = explorer;
  $("found").textContent = list.length ? `${explorer.at + 1} of ${list.length}` : "no such question";
  $("previous").disabled = explorer.at <= 0;
  $("next").disabled = explorer.at >= list.length - 1;
  const place = $("question");
  const q = list[explorer.at];
  if (!q) { place.replaceChildren(); return; }
  history.replaceState(null, "", "#q=" + encodeURIComponent(q.id));
  const methods = Object.keys(q.answers);
  if (!methods.includes(explorer.method)) explorer.method = methods.find((m) => q.answers[m].kept) || methods[0];
  const canvas = make("canvas", { width: 480, height: Math.round((480 * q.grid[0]) / q.grid[1]) });
  const image = make("img", { src: data.pictures[q.image], alt: "the picture asked about" });
  const note = make("p", { class: "fine" });
  const rows = methods.map((m) => {
    const answer = q.answers[m];
    return make(
      "li", {},
      make(
        "button",
        { type: "button", "data-method": m, "aria-pressed": m === explorer.method, onclick: () => { explorer.method = m; drawQuestion(); } },
        make("span", {}, m), make("span", { class: answer.score >= 0.5 ? "right" : "wrong" }, answer.text || "(nothing)"),
        make("span", { class: "where" }, `${answer.tokens} tokens`),
      ),
    );
  });
  const facts = [q.task_title, q.regime, q.kind].filter(Boolean).join(" · ");
  place.replaceChildren(
    make("div", {}, make("div", { class: "picture" }, image, canvas), note),
    make(
      "div", {}, make("p", { class: "fine" }, `${facts} · ${q.id} `, make("a", { href: "#q=" + encodeURIComponent(q.id) }, "link")),
      make("pre", {}, q.text), make("p", {}, "Right answer: ", make("b", {}, q.target)), make("ul", {}, ...rows),
    ),
  );
  overlay(canvas, q, q.answers[explorer.method], note);
}

/** Which kept token (by place) took in each dropped place: Map from place of the picture. */
const holders = (merged) => new Map((merged || []).map((place, i) => [i, place]).filter(([, place]) => place >= 0));

function overlay(canvas, q, answer, note) {
  const context = canvas.getContext("2d"), [rows, cols] = q.grid;
  const w = canvas.width / cols, h = canvas.height / rows;
  if (!answer.kept) {
    const all = answer.tokens === rows * cols;
    note.textContent = all ? "Every token is kept." : "What it keeps are no places of this picture (it sees a smaller one), or it was not recorded.";
    return;
  }
  context.fillStyle = "rgba(20, 23, 28, .72)";
  context.fillRect(0, 0, canvas.width, canvas.height);
  const cell = (index) => [(index % cols) * w, Math.floor(index / cols) * h];
  const own = answer.kept.filter((i) => i >= 0);
  const holder = holders(answer.merged);
  for (const index of own) context.clearRect(...cell(index), w, h);
  const places = [...new Set(holder.values())].sort((a, b) => a - b);
  const tint = new Map(places.map((place, i) => [place, `hsl(${(47 * i) % 360} 80% 55%)`]));
  for (const [index, place] of holder) {
    context.clearRect(...cell(index), w, h);
    context.globalAlpha = 0.5;
    context.fillStyle = tint.get(place);
    context.fillRect(...cell(index), w, h);
    context.globalAlpha = 1;
  }
  for (const place of places) {
    if (answer.kept[place] < 0) continue;
    const [x, y] = cell(answer.kept[place]);
    context.strokeStyle = tint.get(place);
    context.lineWidth = 3;
    context.strokeRect(x + 1.5, y + 1.5, w - 3, h - 3);
  }
  if (answer.ordered) {
    own.forEach((index, i) => {
      context.strokeStyle = `hsl(${Math.round(210 - (210 * i) / own.length)} 90% 55%)`;
      context.lineWidth = 2;
      const [x, y] = cell(index);
      context.strokeRect(x + 1, y + 1, w - 2, h - 2);
    });
  }
  context.strokeStyle = "#ffd400";
  context.lineWidth = 2;
  for (const index of q.evidence || []) { const [x, y] = cell(index); context.strokeRect(x, y, w, h); }
  const made = answer.kept.length - own.length;
  note.textContent =
    (own.length === 1 ? "1 place kept" : `${own.length} places kept`) + (made ? `, ${made} tokens made` : "") + (holder.size ? `; tinted: ${holder.size} places merged into ${places.length} tokens, one colour each (framed where the token has a place)` : "") +
    (answer.ordered ? "; frames from blue (first) to red (last chosen)" : "") + ((q.evidence || []).length ? "; yellow: where the answer is" : "");
}

// ---- start

options($("budget"), data.blocks.map((b, i) => [i, b.label]));
$("column").replaceChildren(
  make("option", { value: "average" }, columns[0][1]),
  ...Object.entries(partsOf).map(([group, label]) => {
    const own = data.columns.filter((c) => (c.group || "task") === group);
    return own.length ? make("optgroup", { label }, ...own.map((c) => make("option", { value: c.name }, c.title))) : null;
  }).filter(there),
);
for (const id of ["budget", "column", "where", "controls"]) {
  $(id).addEventListener("change", () => { if (id === "column") { state.sort = null; state.down = true; } drawBoard(); });
}
$("axis").addEventListener("change", drawPlot);
window.addEventListener("resize", drawPlot);
drawBoard();
drawPlot();
if (data.questions.length) {
  const methods = [...new Set(data.questions.flatMap((q) => Object.keys(q.answers)))];
  const uniq = (key, title = key) => [...new Map(data.questions.filter((q) => q[key]).map((q) => [q[key], q[title]]))];
  options($("right"), [["", "any"], ...methods.map((m) => [m, m])]);
  options($("wrong"), [["", "any"], ...methods.map((m) => [m, m])]);
  options($("task"), [["", "any"], ...uniq("task", "task_title")]);
  if ($("regime")) { options($("regime"), [["", "any"], ...uniq("regime")]); options($("kind"), [["", "any"], ...uniq("kind")]); }
  for (const id of ["right", "wrong", "task", "regime", "kind"]) if ($(id)) $(id).addEventListener("change", () => refilter());
  const step = (n) => { explorer.at += n; drawQuestion(); };
  $("previous").addEventListener("click", () => step(-1));
  $("next").addEventListener("click", () => step(1));
  $("embedded").textContent = `${data.questions.length} of ${data.asked} questions are embedded` +
    (data.questions.length < data.asked ? " (a fixed sample; --explore N embeds more)." : ".");
  const asked = /^#q=(.+)$/.exec(location.hash);
  refilter(asked ? decodeURIComponent(asked[1]) : null);
  if (asked) $("explorer").scrollIntoView();
}
