"""The look of the report's page. Every pair of colours in PAIRS has a contrast of 4.5:1 or more (WCAG 2.2, AA)."""

INK, PAPER, SHADE = "#1d2329", "#ffffff", "#f3f5f7"
MUTED, LINK, LINE = "#4f5b66", "#00559b", "#ccd3da"
NOTE_INK, NOTE = "#4a3500", "#fff6df"

# text on its background, wherever there is text
PAIRS = [(INK, PAPER), (INK, SHADE), (MUTED, PAPER), (MUTED, SHADE), (LINK, PAPER), (NOTE_INK, NOTE)]

STYLESHEET = f"""
* {{ box-sizing: border-box; }}
body {{
  margin: 0 auto; max-width: 76rem; padding: 1.5rem 1rem 3rem; background: {PAPER}; color: {INK};
  overflow-wrap: anywhere;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif;
}}
h1, h2, h3 {{ line-height: 1.25; }}
h1 {{ font-size: 1.75rem; margin: 0 0 .25rem; }}
h2 {{ font-size: 1.375rem; margin: 2.5rem 0 .75rem; padding-top: .75rem; border-top: 2px solid {LINE}; }}
h3 {{ font-size: 1.0625rem; margin: 0 0 .5rem; }}
p {{ margin: .5rem 0; max-width: 46rem; }}
a {{ color: {LINK}; }}
.muted {{ color: {MUTED}; }}
nav ul {{ display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; list-style: none; margin: .75rem 0 0; padding: 0; }}
nav a {{ display: inline-block; padding: .25rem 0; }}
.scroll {{ overflow-x: auto; max-width: 100%; }}
.scroll:focus-visible, a:focus-visible, summary:focus-visible {{ outline: 3px solid {LINK}; outline-offset: 2px; }}
table {{ width: 100%; max-width: 46rem; border-collapse: collapse; font-variant-numeric: tabular-nums; }}
caption {{ text-align: left; color: {MUTED}; padding-bottom: .5rem; font-size: .9375rem; }}
th, td {{ padding: .4rem .75rem; border-bottom: 1px solid {LINE}; text-align: right; vertical-align: top; }}
th {{ font-weight: 600; }}
.scroll td {{ white-space: nowrap; }}
tbody th, thead th:first-child {{ text-align: left; }}
thead th {{ background: {SHADE}; min-width: 4.5rem; max-width: 14rem; }}
.difference {{ display: block; color: {MUTED}; font-size: .875rem; white-space: nowrap; }}
time {{ white-space: nowrap; }}
.figures {{ columns: 2 28rem; column-gap: 1.25rem; }}
figure {{ margin: 0 0 1.25rem; padding: 1rem; border: 1px solid {LINE}; border-radius: .5rem; break-inside: avoid; }}
figure img {{ display: block; width: 100%; max-width: 33rem; height: auto; margin: 0 auto; }}
figcaption {{ color: {MUTED}; font-size: .9375rem; margin-top: .75rem; }}
.notes {{
  background: {NOTE}; color: {NOTE_INK}; border-left: 4px solid {NOTE_INK};
  margin: 1rem 0; padding: .5rem 1rem .5rem 2rem; max-width: 46rem;
}}
details {{ margin: 1rem 0; }}
summary {{ cursor: pointer; padding: .25rem 0; color: {LINK}; }}
details td, details th {{ text-align: left; font-size: .9375rem; }}
footer {{ margin-top: 3rem; color: {MUTED}; font-size: .9375rem; }}
@media (max-width: 30rem) {{
  body {{ padding: 1rem .75rem 2rem; }}
  h1 {{ font-size: 1.5rem; }}
  th, td {{ padding: .35rem .4rem; font-size: .875rem; }}
  figure {{ padding: .75rem .5rem; }}
}}
@media print {{ figure {{ break-inside: avoid; }} nav {{ display: none; }} }}
"""
