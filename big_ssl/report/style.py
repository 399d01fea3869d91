"""The style sheet of the page: one column on a phone, dark where the reader's system is."""

CSS = """
:root { color-scheme: light dark; --paper: #ffffff; --card: #f6f7f9; --ink: #1f2328; --quiet: #5b6470; --rule: #d7dbe0;
  --line: #1f6fb2; --mark: #b3541e; --healthy: #2f8f5b; --warning: #d9a400; --collapsed: #c4342d; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --card: #1d2126; --ink: #e6e9ed; --quiet: #9aa4b0;
  --rule: #343a42; --line: #6cb2ee; --mark: #f0a06a; --healthy: #4fb481; --warning: #e2b93b; --collapsed: #ef6d65; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 20px 16px 48px; max-width: 1120px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 22px; line-height: 1.35; margin: 0 0 10px; }
h2 { font-size: 17px; margin: 34px 0 10px; padding-bottom: 4px; border-bottom: 1px solid var(--rule); }
h3 { font-size: 15px; margin: 0 0 6px; } .charts + h3 { margin-top: 16px; } .scroll + .charts { margin-top: 12px; } h3 .quiet { font-weight: 400; } .protocol { margin: 8px 0 0; }
p, ul { margin: 0 0 10px; } ul { padding-left: 20px; }
.quiet, figcaption, .protocol { color: var(--quiet); font-size: 13px; }
.chip { display: inline-block; padding: 1px 10px; border-radius: 10px; color: #fff; font-size: 13px; margin-right: 6px; }
.chip.healthy { background: #2b7f51; } .chip.warning { background: #8a6500; } .chip.collapsed, .chip.failed { background: #b42a24; }
.chip.plain { background: #5b6470; }
.charts, .cards { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 310px), 1fr)); }
.chart, .card { margin: 0; padding: 10px 12px; background: var(--card); border: 1px solid var(--rule); border-radius: 8px; min-width: 0; }
.chart figcaption { display: flex; justify-content: space-between; gap: 8px; color: var(--ink); }
.latest { font-variant-numeric: tabular-nums; font-weight: 600; }
svg { display: block; width: 100%; height: auto; }
.grid { stroke: var(--rule); stroke-width: 1; } .tick, .marked { fill: var(--quiet); font-size: 10px; }
.line { fill: none; stroke: var(--line); stroke-width: 1.8; stroke-linejoin: round; } .dot { fill: var(--line); }
.mark { stroke: var(--mark); stroke-width: 1.2; stroke-dasharray: 4 3; } .marked { fill: var(--mark); }
.strip { height: 14px; border-radius: 4px; margin: 4px 0 8px; }
.state.healthy { fill: var(--healthy); } .state.warning { fill: var(--warning); } .state.collapsed { fill: var(--collapsed); }
.p0 { fill: #4e79a7; } .p1 { fill: #59a14f; } .p2 { fill: #b07aa1; } .p3 { fill: #9c755f; } .p4 { fill: #f28e2b; }
.p5 { fill: #e15759; } .p6 { fill: #8b8f94; }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 6px; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 14px; min-width: 60%; }
th, td { text-align: right; padding: 3px 10px 3px 0; border-bottom: 1px solid var(--rule); font-variant-numeric: tabular-nums; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { color: var(--quiet); font-weight: 500; white-space: normal; vertical-align: bottom; }
td { vertical-align: top; } td.best { font-weight: 600; } th.text, th.word, td.word { text-align: left; }
td.text { white-space: normal; text-align: left; overflow-wrap: anywhere; }
.picture { margin: 0 0 22px; } .picture .scroll { background: #fff; border: 1px solid var(--rule); border-radius: 8px; padding: 4px; }
.picture img { display: block; max-width: 100%; height: auto; }
dl { display: grid; grid-template-columns: minmax(90px, max-content) 1fr; gap: 4px 16px; margin: 0 0 10px; }
dt { color: var(--quiet); } dd { margin: 0; overflow-wrap: anywhere; }
pre { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 10px; overflow-x: auto; font-size: 12.5px; }
summary { cursor: pointer; color: var(--quiet); margin: 8px 0; }
@media (max-width: 480px) { body { padding: 14px 12px 40px; } h1 { font-size: 19px; } dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: 8px; } .picture img { max-width: max(100%, 560px); } }
"""
