"""The report's style: one narrow column, light and dark, on screen and on paper."""

CSS = """
:root {
  color-scheme: light dark;
  --ink: #1b2126; --muted: #5c6772; --grid: #dfe3e7; --paper: #ffffff; --tint: #f5f7f8;
  --band-full: transparent; --band-warmup: #e9edf0; --band-lora: #f4f6f8;
  --accent: #0a6aa6; --warn: #9a5b00; --warn-tint: #fdf6e8;
  --sans: "Inter", "Source Sans 3", system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif;
  --mono: ui-monospace, "SFMono-Regular", "Cascadia Mono", "DejaVu Sans Mono", monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e4e8eb; --muted: #9aa6b1; --grid: #313940; --paper: #14181c; --tint: #1c2227;
    --band-warmup: #242b31; --band-lora: #1b2126;
    --accent: #62b4e4; --warn: #e5b35c; --warn-tint: #2a2417;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.55 var(--sans); }
main { max-width: 980px; margin: 0 auto; padding: 56px 28px 80px; }
h1 { font-size: 27px; line-height: 1.2; font-weight: 600; letter-spacing: -0.01em; margin: 0 0 6px;
     overflow-wrap: anywhere; }
h2 { font-size: 17px; font-weight: 600; margin: 52px 0 12px; padding-top: 14px; border-top: 1px solid var(--grid); }
p { max-width: 46em; margin: 0 0 12px; }
.sub { color: var(--muted); margin: 0 0 26px; }
.lead { font-size: 16.5px; line-height: 1.6; }
.note { color: var(--muted); font-size: 13.5px; }
.alert { background: var(--warn-tint); border-left: 3px solid var(--warn); padding: 10px 16px; margin: 0 0 18px; }
.alert p { margin: 0; } .alert p + p { margin-top: 6px; }
.scroll { overflow-x: auto; margin: 10px 0 14px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; line-height: 1.4;
        font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: baseline; padding: 7px 16px 7px 0; border-bottom: 1px solid var(--grid); }
th:last-child, td:last-child { padding-right: 0; }
thead th { color: var(--muted); font-weight: 500; border-bottom-color: var(--muted); vertical-align: bottom; }
tbody th { font-weight: 500; white-space: nowrap; }
.num { text-align: right; }
td.num { white-space: nowrap; }
.small { color: var(--muted); font-size: 12.5px; }
td.text:last-child { min-width: 16em; overflow-wrap: anywhere; }
strong { font-weight: 600; }
.flag { color: var(--warn); font-weight: 600; }
.pairs { display: grid; grid-template-columns: 1fr 1fr; gap: 0 40px; }
.pairs td { overflow-wrap: anywhere; font-family: var(--mono); font-size: 12.5px; }
.pairs h3 { font-size: 14px; font-weight: 600; margin: 0 0 2px; }
.pairs .scroll { margin-top: 4px; }
figure { margin: 26px 0 34px; break-inside: avoid; }
figure svg { display: block; width: 100%; height: auto; }
figcaption { color: var(--muted); font-size: 13.5px; margin-top: 8px; max-width: 54em; }
figcaption b { color: var(--ink); font-weight: 600; }
footer { margin-top: 56px; color: var(--muted); font-size: 12.5px; }
@media (max-width: 720px) {
  main { padding: 32px 18px 56px; } .pairs { grid-template-columns: 1fr; }
  figure { overflow-x: auto; } figure svg { min-width: 640px; }
}
@media print {
  :root {
    color-scheme: light;
    --ink: #000000; --muted: #454d54; --grid: #cfd4d8; --paper: #ffffff; --tint: #ffffff;
    --band-warmup: #e6e9ec; --band-lora: #f3f4f5; --warn: #7a4800; --warn-tint: #ffffff;
  }
  @page { margin: 16mm; }
  body { font-size: 10pt; } main { max-width: none; padding: 0; }
  h2 { break-after: avoid; } tr { break-inside: avoid; } .scroll { overflow: visible; }
  figure svg, .alert { print-color-adjust: exact; }
}
"""
