"""Style sheet of the report page: two themes, narrow screens and paper."""

from typing import Final

from trainer.report.page_colours import COLOURS, SERIES, Theme, scale_colours

_RULES: Final = """
* { box-sizing: border-box }
html {
  font: 15px/1.5 ui-sans-serif, system-ui, "DejaVu Sans", sans-serif; color: var(--text);
  background: var(--page);
}
body { max-width: 1320px; margin: 0 auto; padding: 20px 16px 60px }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere }
h2 { font-size: 1.25rem; margin: 44px 0 2px; padding-top: 10px; border-top: 1px solid var(--grid) }
h3 { font-size: 1rem; margin: 14px 0 6px; overflow-wrap: anywhere }
p { margin: 0 0 10px; max-width: 90ch }
.note, caption span { color: var(--quiet); font-weight: 400 }
a { color: var(--link) }
nav { margin: 12px 0 }
nav a { margin-right: 14px; white-space: nowrap }
.grid {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); gap: 14px;
  align-items: start; margin-bottom: 14px;
}
.pair {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 520px), 1fr)); gap: 14px;
  align-items: start;
}
figure, .card {
  margin: 0 0 14px; padding: 12px; background: var(--card); border: 1px solid var(--grid); border-radius: 8px;
  min-width: 0;
}
.grid > figure, .maps > figure, .grid > .card { margin: 0 }
.maps { display: flex; flex-wrap: wrap; gap: 10px; margin-bottom: 14px }
.maps > figure { max-width: 100% }
.maps figcaption { width: 0; min-width: 100% }
.maps figcaption .note { display: block }
.bars { max-width: 560px }
.card > h3 { margin-top: 0 }
.card .note { font-size: .87rem; margin-bottom: 4px }
figcaption, caption { font-weight: 600; text-align: left; padding-bottom: 6px }
.plot { display: block; width: 100%; height: auto; font-size: 11px; fill: var(--text); font-family: inherit }
.plot .inside { fill: var(--page); font-size: 10px; pointer-events: none }
.plot .quiet { fill: var(--quiet) }
.end { text-anchor: end }
.mid { text-anchor: middle }
.axis { stroke: var(--axis) }
.rule { stroke: var(--grid) }
.plot path[data-steps], .key path { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round }
.plot path.dot { stroke-width: 7 }
.keys {
  list-style: none; margin: 8px 0 0; padding: 0; display: flex; flex-wrap: wrap; gap: 2px 16px;
  font-size: .87rem;
}
.keys b { font-variant-numeric: tabular-nums }
.key { width: 24px; height: 8px; vertical-align: middle; margin-right: 4px }
.band { opacity: .75 }
.band.faint { fill: var(--axis); opacity: .16 }
.plot.flow { max-width: none }
.plot .band:hover { opacity: 1 }
.swatch { display: inline-block; width: 11px; height: 11px; margin-right: 5px; border-radius: 2px }
.wide { overflow-x: auto; max-width: 100%; margin-bottom: 12px }
details .wide { max-height: 320px; overflow-y: auto }
table { border-collapse: collapse; font-size: .87rem }
td, th { padding: 3px 9px; text-align: left; vertical-align: top }
thead th { border-bottom: 1px solid var(--axis); white-space: nowrap }
tbody tr + tr > * { border-top: 1px solid var(--grid) }
.number { text-align: right }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap }
.heat td, .heat th { border: 0; padding: 2px 4px; text-align: center; min-width: 26px; white-space: nowrap }
.heat tbody tr + tr > * { border-top: 1px solid var(--card) }
.heat tbody th { text-align: right; font-weight: 400; padding-right: 8px }
.heat thead th, .heat thead td { border: 0; font-weight: 400; color: var(--quiet) }
.heat td { font-variant-numeric: tabular-nums }
dl {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 230px), 1fr)); gap: 6px 18px;
  margin: 8px 0;
}
dl div { min-width: 0 }
dt { color: var(--quiet); font-size: .83rem }
dd { margin: 0; overflow-wrap: anywhere }
.chip {
  display: inline-block; background: var(--chip); border-radius: 4px; padding: 0 5px; margin: 2px 3px 2px 0;
  white-space: pre-wrap; overflow-wrap: anywhere;
}
.chip, .excerpt, code { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: .83rem }
td:has(> .chip) { min-width: 200px }
.chip small { color: var(--quiet) }
.excerpt { margin: 3px 0; white-space: pre-wrap; overflow-wrap: anywhere }
mark { background: var(--chip); color: inherit; font-weight: 700; border-bottom: 2px solid var(--link) }
.alarm { border-left: 4px solid var(--alarm) }
.alarm h3 { color: var(--alarm); margin-top: 0 }
.fine { color: var(--good) }
summary { cursor: pointer; color: var(--link); font-size: .87rem; margin: 6px 0 }
ul { padding-left: 20px }
th button {
  font: inherit; font-weight: 600; color: inherit; background: none; border: 0; padding: 0; cursor: pointer;
}
th[aria-sort=ascending] button::after { content: " \\2191" }
th[aria-sort=descending] button::after { content: " \\2193" }
#readout {
  position: fixed; z-index: 9; pointer-events: none; background: var(--page); border: 1px solid var(--axis);
  border-radius: 6px; padding: 4px 9px; font-size: .83rem; white-space: pre; max-width: 94vw; overflow: hidden;
}
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px }
@media (max-width: 600px) {
  .plot { font-size: 12px }
  figure, .card { padding: 10px 8px }
  dl { grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)) }
  td, th { padding: 3px 5px }
  td:has(> .chip) ~ td:not(.number) { min-width: 130px }
  thead th { white-space: normal; vertical-align: bottom }
  body { padding: 14px 10px 40px }
}
@media print {
  body { max-width: none; padding: 0 }
  nav, summary, #readout, figure details, .card details, #card details { display: none }
  #words > details > summary, #words > div > details > summary { display: block; color: inherit; font-weight: 600 }
  figure, .card, tr { break-inside: avoid }
  details::details-content { content-visibility: visible; display: block; height: auto }
  h2, h3, summary, section > .note { break-after: avoid }
  .wide { overflow: visible }
  .heat td, .swatch, .chip, mark, .plot { -webkit-print-color-adjust: exact; print-color-adjust: exact }
}
"""


def style_sheet() -> str:
    """Return the whole style sheet; paper has the light theme."""
    dark = "\n".join(_theme("dark"))
    light = "\n".join(_theme("light"))
    return (
        f":root {{ color-scheme: light dark }}\n{light}\n"
        f"@media screen and (prefers-color-scheme: dark) {{\n{dark}\n}}{_RULES}"
    )


def _theme(theme: Theme) -> list[str]:
    names = "; ".join(f"--{name}: {colour}" for name, colour in COLOURS[theme].items())
    rules = [f":root {{ {names} }}"]
    for index, colour in enumerate(SERIES[theme]):
        rules.append(
            f".s{index} {{ stroke: {colour} }} .f{index} {{ fill: {colour} }} .b{index} {{ background: {colour} }}"
        )
    for step, (background, ink) in enumerate(scale_colours(theme)):
        rules.append(f".c{step} {{ background: {background}; color: {ink} }}")
    return rules
