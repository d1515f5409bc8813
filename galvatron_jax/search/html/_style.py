"""The style of the page: light and dark, wide and narrow; system fonts only."""

STYLE = """
:root { color-scheme: light dark; --ground: #fbfbfa; --card: #ffffff; --ink: #1c2127; --soft: #5d6773; --rule: #e3e6ea;
  --idle: #eef0f2; --warn: #c43d3d; --good: #2c7a3f; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171b; --card: #1c2026; --ink: #e6e9ee; --soft: #98a3b1;
  --rule: #323942; --idle: #272d35; --warn: #ff8a80; --good: #7bd08c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 0 0 4px; }
p { margin: 0 0 12px; color: var(--soft); }
.note { font-size: 13px; }
.warn { color: var(--warn); }
section { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 18px 18px 14px;
  margin-top: 16px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(158px, 1fr)); gap: 12px; margin: 18px 0 0; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 12px 14px; }
.card b { display: block; font-size: 22px; line-height: 1.3; font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: 13px; }
.good { color: var(--good); }
.chart { overflow-x: auto; }
.chart svg { display: block; width: 100%; min-width: 760px; height: auto; }
.small svg { min-width: 0; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 12px 20px; }
.scroll { overflow-x: auto; }
svg text { fill: var(--ink); font-size: 12px; font-variant-numeric: tabular-nums; }
svg .tick, svg .axis { fill: var(--soft); }
svg .head { font-size: 13px; font-weight: 600; }
svg .strong { font-weight: 700; }
svg .bad { fill: var(--warn); }
svg .inside { fill: #ffffff; font-size: 11px; font-weight: 600; }
svg .grid { stroke: var(--rule); display: inline; }
svg .node { stroke: var(--soft); stroke-dasharray: 2 3; }
svg .group { stroke: var(--card); stroke-width: 1; }
svg .block, svg .box { stroke: var(--card); stroke-width: 1; }
svg .idle { fill: var(--idle); }
svg .stroke { stroke: #ffffff; stroke-opacity: .55; stroke-width: 1.5; }
svg .dot { fill: #ffffff; fill-opacity: .6; }
svg .budget { stroke: var(--warn); stroke-dasharray: 6 4; stroke-width: 1.5; }
svg .curve { fill: none; stroke: var(--soft); stroke-width: 2; }
svg .point { fill: #4e79a7; }
svg .beyond { fill: var(--card); stroke: #4e79a7; stroke-width: 2; }
svg .chosen { fill: #f28e2b; stroke: var(--card); stroke-width: 2; }
.stack { display: flex; height: 34px; border-radius: 4px; overflow: hidden; }
.stack span { color: #ffffff; font-size: 12px; font-weight: 600; text-align: center; line-height: 34px; }
.row { display: flex; align-items: center; gap: 4px 10px; padding: 3px 0; font-size: 13.5px; }
.row .who { width: 110px; text-align: right; flex: none; }
.row .bar { height: 20px; border-radius: 3px; background: #bab0ac; flex: none; }
.row .mine { background: #4e79a7; }
.row .what { font-variant-numeric: tabular-nums; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin-top: 8px; font-size: 13px; color: var(--soft); }
.key { white-space: nowrap; }
.key i, .swatch { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 6px;
  vertical-align: -1px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums;
  margin-top: 10px; }
th { text-align: left; color: var(--soft); font-weight: 600; }
th, td { padding: 4px 14px 4px 0; white-space: nowrap; border-bottom: 1px solid var(--rule); }
summary { cursor: pointer; color: var(--soft); margin-top: 10px; }
footer { color: var(--soft); font-size: 13px; margin-top: 22px; overflow-wrap: anywhere; }
@media (max-width: 560px) { main { padding: 18px 12px 40px; } h1 { font-size: 21px; }
  .grid { grid-template-columns: 1fr; } section { padding: 14px 12px; }
  .row { flex-wrap: wrap; } .row .who { width: 88px; } .row .what { margin-left: 98px; font-size: 12.5px; }
  .cards { grid-template-columns: repeat(2, 1fr); } .card b { font-size: 18px; } }
"""
