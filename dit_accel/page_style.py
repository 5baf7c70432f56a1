"""The style sheet and the script of our pages: everything inline, nothing fetched."""

STYLE = """
:root { color-scheme: light dark; --ink: #16191f; --dim: #667085; --paper: #fbfbfc; --card: #fff;
    --line: #e4e7ec;
  --accent: #0f62c9; --warn: #8a4b00; --warn-paper: #fff6e6; --exact: #5b6678; --none: #eef0f3;
    --other: #d92d20;
  --c0: #2e90fa; --c1: #f79009; --c2: #12b76a; --c3: #9b5de5; --c4: #ee46bc; --c5: #06aed4; --c6: #a3c614;
  --c7: #c4622d; --c8: #7a5af8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e9ecf1; --dim: #98a2b3; --paper: #101318;
    --card: #181c23;
  --line: #2b313b; --accent: #6cb0ff; --warn: #ffc46b; --warn-paper: #2c2313; --exact: #9aa6b8;
    --none: #22272f;
  --other: #ff6f61; --c0: #4aa3ff; --c1: #ffab40; --c2: #35d08a; --c3: #b98bff; --c4: #ff7ad0;
    --c5: #3fd0ee;
  --c6: #bfe03a; --c7: #e08a5a; --c8: #9c86ff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 44px 0 12px; }
h3 { font-size: 13px; margin: 16px 0 6px; color: var(--dim); font-weight: 600; }
p { margin: 6px 0; } .dim { color: var(--dim); } .small { font-size: 13px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px;
    margin: 26px 0 8px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
.card b { display: block; font-size: 25px; line-height: 1.2; font-weight: 650;
    font-variant-numeric: tabular-nums; }
.card span { color: var(--dim); font-size: 13px; }
.card.first b { color: var(--accent); }
table { border-collapse: collapse; width: 100%; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; border-spacing: 0; overflow: hidden; font-variant-numeric: tabular-nums; }
th, td { padding: 8px 14px; text-align: right; border-top: 1px solid var(--line); vertical-align: top; }
thead th { border-top: 0; color: var(--dim); font-weight: 600; font-size: 13px; }
th:first-child, td:first-child { text-align: left; font-weight: 400; }
.films { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(240px, 1fr)); }
figure { margin: 0; } figcaption { font-size: 13px; color: var(--dim); margin-top: 6px; }
video, img { width: 100%; display: block; border-radius: 8px; background: var(--none);
    image-rendering: pixelated; }
.prompt { margin: 22px 0 8px; }
.prompt:first-of-type { margin-top: 0; }
.player { display: flex; gap: 12px; align-items: center; margin: 0 0 14px; }
button { font: inherit; padding: 5px 16px; border-radius: 8px; border: 1px solid var(--line);
    cursor: pointer;
  background: var(--card); color: var(--ink); }
input[type=range] { flex: 1; accent-color: var(--accent); }
.plan { overflow: auto; max-height: 640px; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; padding: 10px 12px; }
.plan svg { display: block; width: 100%; height: auto; }
svg text { font-size: 10.5px; fill: var(--ink); text-anchor: middle; font-family: inherit; }
svg text.name { text-anchor: end; } svg text.dim { fill: var(--dim); }
.exact { fill: var(--exact); } .none { fill: var(--none); }
.other { fill: none; stroke: var(--other); stroke-width: 1.5; }
.c0 { fill: var(--c0); } .c1 { fill: var(--c1); } .c2 { fill: var(--c2); } .c3 { fill: var(--c3); }
.c4 { fill: var(--c4); } .c5 { fill: var(--c5); } .c6 { fill: var(--c6); } .c7 { fill: var(--c7); }
.c8 { fill: var(--c8); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 4px 20px; padding: 0; margin: 0 0 8px;
  font-size: 13px; }
.legend li { display: flex; gap: 7px; align-items: center; } .legend svg { width: 14px; height: 14px; }
.bar { display: flex; align-items: center; gap: 10px; margin: 6px 0; font-size: 13px; }
.bar > span { flex: 0 0 190px; text-align: right; color: var(--dim); overflow-wrap: anywhere; }
.bar svg { flex: 1; height: 22px; min-width: 0; } .bar > b { flex: 0 0 74px; font-weight: 600; }
.notes { background: var(--warn-paper); color: var(--warn); border-radius: 10px;
    padding: 12px 16px 12px 34px;
  margin: 0; } .notes li { margin: 3px 0; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 16px;
  overflow: auto; font-size: 12.5px; margin: 0; }
details { margin-top: 28px; } summary { cursor: pointer; margin-bottom: 10px; color: var(--dim); }
footer { margin-top: 48px; color: var(--dim); font-size: 13px; }
@media (max-width: 640px) { .bar > span { flex-basis: 92px; } main { padding: 24px 14px 48px; } }
"""

# all films of the page show the same moment: one play button, one slider
SCRIPT = """
const films = [...document.querySelectorAll('video')], play = document.getElementById('play'),
  slider = document.getElementById('slider');
if (films.length && play) {
  const lead = films[0], each = act => films.forEach(act);
  const set = on => { each(v => on ? v.play().catch(() => {}) : v.pause());
    play.textContent = on ? 'Pause' : 'Play'; };
  play.onclick = () => set(lead.paused);
  slider.oninput = () => { set(false); each(v => v.currentTime = slider.value / 1000 * v.duration); };
  const follow = () => {
    if (!lead.paused && lead.duration) {
      slider.value = 1000 * lead.currentTime / lead.duration;
      films.slice(1).forEach(v => {
    if (Math.abs(v.currentTime - lead.currentTime) > 0.12) v.currentTime = lead.currentTime; });
    }
    requestAnimationFrame(follow);
  };
  follow(); set(true);
}
"""
