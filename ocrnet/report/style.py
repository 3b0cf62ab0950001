"""CSS and JavaScript of the report, which are embedded in the page."""

CSS = """
:root{color-scheme:light dark;--bg:#f7f7f5;--card:#fff;--ink:#1b1c1e;--soft:#686c72;--line:#e3e3df;--track:#ecece8;
--accent:#2563c9;--bad:#c8401f;--good:#0b7a5c;--s1:#2563c9;--s2:#d9580d;--s3:#0b8468;--s4:#8446c6;--s5:#a86a00;
--s6:#c22f72;--heat-ink:#fff}
@media (prefers-color-scheme:dark){:root{--bg:#121315;--card:#1a1b1e;--ink:#e8e8e5;--soft:#9b9fa6;--line:#2d2f33;
--track:#2a2c30;--accent:#82b1ff;--bad:#ff8a66;--good:#56d3ab;--s1:#82b1ff;--s2:#ff9e5e;--s3:#56d3ab;--s4:#c6a0ff;
--s5:#e6b84c;--s6:#ff8dbb;--heat-ink:#101114}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",
sans-serif;-webkit-text-size-adjust:100%}
main{max-width:1180px;margin:0 auto;padding:36px 20px 64px}
h1{font-size:30px;line-height:1.2;margin:0;letter-spacing:-.02em;overflow-wrap:anywhere}
h2{font-size:19px;letter-spacing:-.01em;margin:0 0 4px}
h3{font-size:14px;margin:22px 0 8px}
p{margin:0 0 12px;max-width:72ch}
.lead,.soft,.none{color:var(--soft)}.lead{font-size:14px}.none{font-size:13px;padding:30px 0;text-align:center}
header p{color:var(--soft);margin:6px 0 0;overflow-wrap:anywhere}
.note{border-left:3px solid var(--s5);padding:8px 14px;margin:20px 0 0;background:var(--card);max-width:none}
.live{color:var(--good);font-weight:600}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(140px,1fr));gap:12px;margin:26px 0 0}
.tile{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 14px}
.tile span{display:block;font-size:12.5px;color:var(--soft)}
.tile b{display:block;font-size:25px;line-height:1.25;font-weight:620;letter-spacing:-.02em;
font-variant-numeric:tabular-nums}
.tile small{color:var(--soft);font-size:12px}
section{margin-top:44px}
.grid{stroke:var(--line)}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(330px,100%),1fr));gap:14px}
figure{margin:0;min-width:0}
.chart,.panel{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 14px;min-width:0}
.chart figcaption{display:flex;flex-wrap:wrap;gap:2px 14px;align-items:baseline;margin-bottom:6px;font-size:13.5px}
.legend{display:flex;flex-wrap:wrap;gap:2px 12px;color:var(--soft);font-size:12.5px;min-width:0}
.legend b{color:var(--ink);font-weight:600;font-variant-numeric:tabular-nums}
.legend span{overflow-wrap:anywhere;min-width:0}
.key{display:inline-block;width:14px;height:3px;border-radius:2px;vertical-align:middle;margin-right:5px}
svg{display:block;width:100%;height:auto}
svg text{fill:var(--soft);font-size:11px;font-variant-numeric:tabular-nums}
.curve{fill:none;stroke-width:1.75;stroke-linejoin:round;stroke-linecap:round}
.s1{stroke:var(--s1)}.s2{stroke:var(--s2)}.s3{stroke:var(--s3)}.s4{stroke:var(--s4)}.s5{stroke:var(--s5)}
.s6{stroke:var(--s6)}
.dot.s1,.key.s1{fill:var(--s1);background:var(--s1)}.dot.s2,.key.s2{fill:var(--s2);background:var(--s2)}
.dot.s3,.key.s3{fill:var(--s3);background:var(--s3)}.dot.s4,.key.s4{fill:var(--s4);background:var(--s4)}
.dot.s5,.key.s5{fill:var(--s5);background:var(--s5)}.dot.s6,.key.s6{fill:var(--s6);background:var(--s6)}
.dot{stroke:none}
.at{stroke:var(--soft);stroke-dasharray:2 3;visibility:hidden}
.scroll{overflow-x:auto;-webkit-overflow-scrolling:touch}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}
th,td{padding:6px 10px 6px 0;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th{font-weight:550;color:var(--soft);font-size:12.5px;vertical-align:bottom}
th:first-child,td:first-child{text-align:left}
tr:last-child td{border-bottom:0}
td.name{max-width:210px;overflow:hidden;text-overflow:ellipsis}
td.wide{width:34%;min-width:110px}
.plain td,.plain th{text-align:left;white-space:normal;overflow-wrap:anywhere;vertical-align:top}
.plain td:first-child{width:38%;color:var(--soft)}
.plain tr.set td{font-weight:600}
.swatch{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:8px;vertical-align:-1px;
box-shadow:0 0 0 1px rgba(127,127,127,.45)}
.bar{display:block;height:9px;border-radius:5px;background:var(--track);overflow:hidden}
.bar i{display:block;height:100%;border-radius:5px;background:var(--accent)}
.bar.s1 i{background:var(--s1)}.bar.s2 i{background:var(--s2)}.bar.s3 i{background:var(--s3)}
.bar.s4 i{background:var(--s4)}.bar.s5 i{background:var(--s5)}.bar.s6 i{background:var(--s6)}
.bar[class*=" s"]{height:6px;margin:3px 0}
.up{color:var(--good)}.down{color:var(--bad)}
.two{display:grid;grid-template-columns:minmax(0,1.7fr) minmax(0,1fr);gap:14px;align-items:start}
.two.narrow{grid-template-columns:minmax(0,360px) minmax(0,1fr);gap:24px}
.heat .cell{fill:var(--track);fill-opacity:.5}.heat .right,.square .right{fill:var(--accent)}
.heat .wrong{fill:var(--bad)}
.heat text{font-size:11.5px}.heat .on,.heat .off{text-anchor:middle;font-size:11px}
.heat .on{fill:var(--heat-ink)}.heat .off{fill:var(--ink)}
.square{max-width:330px}.square .right{fill-opacity:.75}.square .over{fill:var(--bad);fill-opacity:.6}
.square .under{fill:var(--good);fill-opacity:.5}
.square .amount{fill:var(--soft);fill-opacity:.55}
.diagonal{stroke:var(--ink);stroke-width:1;stroke-dasharray:4 4;opacity:.6}
ol.pairs{margin:0;padding:0;list-style:none;font-size:14px}
ol.pairs li{display:flex;gap:12px;justify-content:space-between;padding:5px 0;border-bottom:1px solid var(--line)}
ol.pairs li:last-child{border:0}ol.pairs span{min-width:0;overflow-wrap:anywhere}
ol.pairs b{font-weight:600;white-space:nowrap}
.sample{margin-top:14px}
.sample figcaption{display:flex;flex-wrap:wrap;justify-content:space-between;gap:0 14px;font-size:13px;
color:var(--soft);margin-bottom:8px}
.sample figcaption b{color:var(--ink);overflow-wrap:anywhere;min-width:0}
.four{display:grid;grid-template-columns:repeat(4,minmax(0,1fr));gap:8px}
.many{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(210px,48%),1fr));gap:8px}
.four div,.many div,.region div{position:relative}
.four span,.many span{max-width:calc(100% - 12px);overflow:hidden;text-overflow:ellipsis;white-space:nowrap;
position:absolute;left:6px;top:6px;background:rgba(12,13,15,.72);color:#f2f2f0;font-size:11.5px;
padding:1px 7px;border-radius:5px}
img{display:block;width:100%;height:auto;border-radius:6px;background:var(--track)}
.classes{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:13px;margin-top:12px}
.classes span{overflow-wrap:anywhere;min-width:0}
.regions{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(165px,46%),1fr));gap:12px;margin-top:12px}
.region figcaption{font-size:12.5px;margin-top:5px;line-height:1.35;overflow-wrap:anywhere}
.region small{color:var(--soft);display:block}
.stage{position:relative;cursor:crosshair;touch-action:manipulation;border-radius:6px}
.stage:focus-visible{outline:2px solid var(--accent);outline-offset:3px}
.pin{position:absolute;width:20px;height:20px;margin:-10px 0 0 -10px;border:2px solid #fff;border-radius:50%;
box-shadow:0 0 0 2px #111,inset 0 0 0 2px #111;pointer-events:none}
.relation{display:grid;grid-template-columns:minmax(70px,auto) minmax(0,1fr) 48px;gap:5px 10px;align-items:center;
font-size:13px}
.relation span{overflow-wrap:anywhere}.relation b{text-align:right;font-weight:550;font-variant-numeric:tabular-nums}
details{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:10px 14px;margin-top:12px}
summary{cursor:pointer;font-weight:600;font-size:14px}
details .scroll{margin-top:8px}
code{font:12.5px/1.5 ui-monospace,"SF Mono",Menlo,Consolas,monospace;overflow-wrap:anywhere}
footer{margin-top:56px;color:var(--soft);font-size:12.5px}
@media (max-width:820px){.two,.two.narrow{grid-template-columns:minmax(0,1fr);gap:14px}
.four{grid-template-columns:repeat(2,minmax(0,1fr))}}
@media (max-width:480px){main{padding:24px 14px 48px}h1{font-size:24px}section{margin-top:36px}
.tiles{grid-template-columns:repeat(2,minmax(0,1fr));gap:8px}.tile b{font-size:21px}th,td{padding-right:8px}
.plain td:first-child{width:46%}td.name{max-width:120px}td.wide{min-width:64px}.maybe{display:none}}
@media print{body{background:#fff}.chart,.tile,.panel,.sample{break-inside:avoid}}
"""

# Shows the values of the curves at the step under the pointer, and the relation to the regions of the pixel that the
# mouse, a tap or the arrow keys select.
SCRIPT = """
for (const svg of document.querySelectorAll("svg[data-points]")) {
  const curves = JSON.parse(svg.dataset.points), [first, last, left, right, unit] = JSON.parse(svg.dataset.ends);
  const line = svg.querySelector(".at"), shown = svg.parentElement.querySelectorAll(".legend b");
  const newest = Array.from(shown, one => one.textContent), title = svg.parentElement.querySelector("figcaption > b");
  const name = title.textContent;
  svg.addEventListener("pointermove", event => {
    const at = svg.getBoundingClientRect(), x = (event.clientX - at.left) / at.width * svg.viewBox.baseVal.width;
    const step = first + (x - left) / (right - left) * (last - first);
    const near = curves.map(all => all.reduce((a, b) => Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a));
    const place = near.reduce((a, b) => Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a)[0];
    const lineX = left + (last > first ? (place - first) / (last - first) : 0.5) * (right - left);
    line.setAttribute("x1", lineX);
    line.setAttribute("x2", lineX);
    line.style.visibility = "visible";
    title.textContent = name + ", step " + place.toLocaleString("en");
    near.forEach((point, k) => shown[k].textContent = Number(point[1].toPrecision(4)) + unit);
  });
  svg.addEventListener("pointerleave", () => {
    line.style.visibility = "hidden";
    title.textContent = name;
    newest.forEach((text, k) => shown[k].textContent = text);
  });
}
(() => {
  const relationData = document.getElementById("relation");
  if (!relationData) return;
  const data = JSON.parse(relationData.textContent), raw = atob(data.bytes), stage = document.querySelector(".stage");
  const pin = stage.querySelector(".pin"), bars = document.querySelectorAll(".relation .bar i");
  const numbers = document.querySelectorAll(".relation b");
  let x = data.x, y = data.y;
  const show = () => {
    pin.style.left = 100 * (x + 0.5) / data.width + "%";
    pin.style.top = 100 * (y + 0.5) / data.height + "%";
    bars.forEach((bar, k) => {
      const share = raw.charCodeAt((k * data.height + y) * data.width + x) / 2.55;
      bar.style.width = share + "%";
      numbers[k].textContent = share.toFixed(1);
    });
  };
  const move = (to_x, to_y) => {
    x = Math.min(Math.max(Math.floor(to_x), 0), data.width - 1);
    y = Math.min(Math.max(Math.floor(to_y), 0), data.height - 1);
    show();
  };
  const selectAt = event => {
    const at = stage.getBoundingClientRect();
    move((event.clientX - at.left) / at.width * data.width, (event.clientY - at.top) / at.height * data.height);
  };
  stage.addEventListener("click", selectAt);
  stage.addEventListener("pointermove", event => { if (event.pointerType === "mouse") selectAt(event); });
  stage.addEventListener("keydown", event => {
    const by = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key];
    if (by) { move(x + by[0], y + by[1]); event.preventDefault(); }
  });
})();
"""
