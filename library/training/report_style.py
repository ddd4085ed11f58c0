"""How `report.html` looks; its colours are those of the charts (`charts.PALETTE`)."""

PAGE_STYLE = """
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif;
  -webkit-text-size-adjust: 100%; }
main { max-width: 1020px; margin: 0 auto; padding: 40px 24px 64px; }
header { margin-bottom: 28px; }
h1 { margin: 0; font-size: 28px; line-height: 1.2; letter-spacing: -0.01em;
  overflow-wrap: anywhere; }
header p { margin: 6px 0 0; color: var(--muted); }
h2 { margin: 44px 0 14px; font-size: 18px; }
h2 small { margin-left: 6px; font-weight: 400; }
time { white-space: nowrap; }
.facts { display: flex; flex-wrap: wrap; gap: 1px; margin: 0;
  background: var(--line); border: 1px solid var(--line); border-radius: 8px;
  overflow: hidden; }
.facts div { flex: 1 1 140px; padding: 14px 16px; background: var(--card); }
dt { color: var(--muted); font-size: 13px; }
dd { margin: 2px 0 0; font-size: 18px; font-variant-numeric: tabular-nums; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 16px; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(290px, 1fr)); gap: 16px; }
.pair { display: flex; gap: 10px; }
figure { flex: 1 1 0; min-width: 0; margin: 0; }
img { display: block; width: 100%; height: auto; border-radius: 4px; background: var(--line); }
figcaption, small { color: var(--muted); font-size: 13px; }
figcaption { margin-top: 4px; text-align: center; }
.card p { margin: 10px 0 0; overflow-wrap: anywhere; }
p small, dd small { display: block; }
.strip { display: flex; gap: 8px; overflow-x: auto; padding-top: 10px; }
.strip figure { flex: 0 0 96px; }
details { margin-top: 10px; }
summary { color: var(--muted); cursor: pointer; }
.charts { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px;
  margin-top: 16px; }
.chart { display: block; width: 100%; height: auto; overflow: visible; }
.narrow { display: none; }
table { width: 100%; border-collapse: collapse; background: var(--card);
  border: 1px solid var(--line); border-radius: 8px; }
td { padding: 9px 16px; border-top: 1px solid var(--line); overflow-wrap: anywhere; }
tr:first-child td { border-top: 0; }
td:last-child { color: var(--muted); text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.figures { border: 0; border-radius: 0; font-size: 13px; }
.figures caption { margin-bottom: 8px; text-align: left; font-weight: 600; }
.figures th { color: var(--muted); font-weight: 400; text-align: left; vertical-align: bottom; }
.figures th, .figures td { padding: 5px 12px 5px 0; }
.figures td { font-variant-numeric: tabular-nums; }
.figures td:last-child { color: var(--ink); }
.figures td:last-child, .figures th:last-child { padding-right: 0; text-align: right; }
.listed { margin-top: 16px; }
pre { margin: 0; padding: 16px; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; overflow-x: auto; font: 13px/1.6 ui-monospace, Consolas, monospace; }
details pre { margin-top: 10px; }
@media (max-width: 640px) {
  main { padding: 24px 16px 48px; }
  .charts, .cards { grid-template-columns: minmax(0, 1fr); }
  .wide { display: none; }
  .narrow { display: block; }
}
@media print { body { background: none; } .card, table, pre { break-inside: avoid; } }
"""
