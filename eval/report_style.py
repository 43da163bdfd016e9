"""The frame of the report: style sheet and the few lines of script that filter the gallery."""

from __future__ import annotations

from string import Template

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { --ink: #1c2026; --soft: #5d6470; --line: #e3e6ea; --good: #0b6e4f; --bad: #b3261e; --half: #8a5a00; }
body { max-width: 68rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; color: var(--ink); background: #fff;
       font: 16px/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.05rem; font-weight: 600; color: var(--soft); }
h2 { margin: 2.75rem 0 .75rem; font-size: 1.2rem; }
header p { margin: 0; color: var(--soft); }
header .number { font-size: 4rem; font-weight: 700; line-height: 1.15; color: var(--good); letter-spacing: -.02em; }
.facts { display: flex; flex-wrap: wrap; gap: .75rem; margin-top: 1.5rem; }
.facts div { padding: .6rem 1rem; border: 1px solid var(--line); border-radius: .5rem; }
.facts b, .facts span { display: block; }
.facts span { font-size: .8rem; color: var(--soft); }
.figure { display: block; max-width: 100%; }
.sources { margin: .25rem 0 0; padding-left: 1.1rem; font-size: .85rem; color: var(--soft); }
table { border-collapse: collapse; font-size: .92rem; }
th, td { padding: .35rem 1.25rem .35rem 0; border-bottom: 1px solid var(--line); text-align: left;
         vertical-align: top; overflow-wrap: anywhere; }
th { font-weight: 600; color: var(--soft); }
select, input { font: inherit; padding: .15rem .4rem; }
.filter label { margin-right: 1rem; }
.filter output { color: var(--soft); }
.gallery { display: grid; gap: .9rem; align-items: start; }
.gallery.small { grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); }
.gallery.large { grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); }
article { padding: .6rem; border: 1px solid var(--line); border-radius: .5rem; font-size: .88rem; line-height: 1.35; }
article[hidden] { display: none; }
article img { display: block; width: 100%; max-height: 20rem; object-fit: contain; margin-bottom: .3rem;
              border-radius: .3rem; background: #f4f5f7; cursor: zoom-in; }
article img.pixels { image-rendering: pixelated; }
article img.enlarged { position: fixed; inset: 0; z-index: 1; width: 100vw; height: 100vh; max-height: none;
                       margin: 0; border-radius: 0; background: #fff; cursor: zoom-out; }
article p { margin: .4rem 0 0; white-space: pre-line; overflow-wrap: anywhere; max-height: 16em; overflow-y: auto; }
article .choices { margin: 0; color: var(--soft); }
article .answer { font-weight: 700; }
.right .answer { color: var(--good); }
.wrong .answer { color: var(--bad); }
.wrong { border-color: var(--bad); }
.partly .answer { color: var(--half); }
.partly { border-color: var(--half); }
table + table, details, details + table { margin-top: 1rem; }
article .truth { margin: 0; color: var(--soft); }
</style>
</head>
<body>
$body
<script>
const [outcome, kind, words] = ["outcome", "kind", "words"].map(id => document.getElementById(id));
const cards = [...document.querySelectorAll("article")];
function filter() {
  for (const card of cards) {
    const fits = (choice, values) => choice.value === "all" || values.includes(choice.value);
    card.hidden = !(fits(outcome, [card.dataset.outcome]) && fits(kind, JSON.parse(card.dataset.kinds)) &&
                    card.textContent.toLowerCase().includes(words.value.trim().toLowerCase()));
  }
  document.getElementById("shown").textContent = cards.filter(card => !card.hidden).length + " shown";
}
for (const image of document.querySelectorAll("article img")) {
  image.onclick = () => image.classList.toggle("enlarged");
}
outcome.onchange = kind.onchange = words.oninput = filter;
filter();
</script>
</body>
</html>
""")
