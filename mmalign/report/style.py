"""The style sheet of the page: light and dark from one set of variables."""

from __future__ import annotations

STYLE = """
:root { --paper: #ffffff; --ink: #1c2024; --soft: #5d6670; --grid: #e3e6e9; --card: #f6f7f8; --warn: #8a5a00;
  --warn-paper: #fff6e0; --better: #117a3c; --worse: #b3261e; --series-0: #1f6fc5; --series-1: #d1600c; --series-2: #15845c;
  --series-3: #9a3fb0; --series-4: #8a7000; --series-5: #c2315e; }
@media (prefers-color-scheme: dark) { :root { --paper: #16191c; --ink: #e7eaed; --soft: #9aa4ae; --grid: #2d3338;
  --card: #1e2226; --warn: #f0c060; --warn-paper: #2c2616; --better: #5bd08a; --worse: #ff8a80; --series-0: #6aaeff;
  --series-1: #ff9d54; --series-2: #4fcf9d; --series-3: #d795ea; --series-4: #d9c04a; --series-5: #ff86a8; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1100px; margin: 0 auto; padding: 24px 20px 80px; }
h1 { font-size: 26px; margin: 8px 0 0; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 40px 0 10px; padding-top: 14px; border-top: 1px solid var(--grid); overflow-wrap: anywhere; }
h2 small { font-size: 14px; font-weight: normal; color: var(--soft); }
h3 { font-size: 15px; margin: 24px 0 8px; }
.note { color: var(--soft); font-size: 13.5px; margin: 6px 0; max-width: 75ch; }
.warning { color: var(--warn); background: var(--warn-paper); border-radius: 6px; padding: 8px 12px; max-width: 90ch; }
.remark { color: var(--soft); background: var(--card); border-radius: 6px; padding: 8px 12px; max-width: 90ch; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: 13px; }
th, td { padding: 5px 18px 5px 0; border-bottom: 1px solid var(--grid); vertical-align: top; }
table.headline td { white-space: nowrap; font-size: 17px; padding-top: 8px; padding-bottom: 8px; }
.better { color: var(--better); } .worse { color: var(--worse); } .same { color: var(--soft); }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(290px, 1fr)); gap: 14px 18px; margin: 14px 0; }
figure { margin: 0; }
.panel svg { width: 100%; height: auto; display: block; }
.panel figcaption { font-size: 13px; color: var(--soft); min-height: 20px; display: flex; gap: 10px;
  justify-content: space-between; }
.last { color: var(--ink); font-variant-numeric: tabular-nums; margin-left: 10px; white-space: nowrap; }
.last i, .key i { display: inline-block; width: 9px; height: 9px; border-radius: 2px; margin-right: 4px; }
svg text { font-size: 10.5px; fill: var(--soft); font-family: inherit; }
svg .unit { font-size: 9.5px; }
svg .grid { stroke: var(--grid); stroke-width: 1; }
svg path { fill: none; }
svg .raw { stroke-width: 1; stroke-opacity: .3; }
svg .smooth { stroke-width: 1.8; stroke-linejoin: round; }
svg .band { fill-opacity: .13; }
.bar svg { width: 100%; height: 22px; border-radius: 4px; display: block; }
.bar figcaption { font-size: 13px; color: var(--soft); margin-top: 6px; }
.key { display: inline-block; margin-right: 16px; }
.grid-of-pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(270px, 1fr)); gap: 14px; margin-top: 10px; }
.pair { background: var(--card); border-radius: 8px; padding: 10px; }
.pair > div { display: flex; gap: 8px; }
.pair figure { flex: 1; min-width: 0; }
.pair img { width: 100%; border-radius: 4px; display: block; }
.pair img.pixels { image-rendering: pixelated; }
.pair figcaption { font-size: 12px; color: var(--soft); margin-top: 3px; }
.prompt { font-size: 13px; margin: 0 0 6px; }
table.texts { width: 100%; table-layout: fixed; }
table.texts td { font-size: 13.5px; }
.model-text { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 320px; overflow-y: auto; }
.role { color: var(--soft); font-size: 12px; }
.answer { color: var(--soft); margin: 6px 0 0; font-size: 12.5px; } .answer .model-text { display: inline; }
.missing { color: var(--soft); font-style: italic; }
.chip { display: inline-block; background: var(--grid); border-radius: 9px; padding: 0 8px; font-size: 12px;
  margin: 1px 3px 1px 0; color: var(--ink); }
details { margin: 12px 0; } summary { cursor: pointer; color: var(--soft); }
pre { background: var(--card); border-radius: 6px; padding: 12px; overflow-x: auto; font-size: 12.5px; line-height: 1.45; }
code { font-size: 12.5px; }
@media print { details { display: none; } }
"""
