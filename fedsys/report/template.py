"""The HTML of a page; a Python text, since apps for Flower are bundled without HTML files."""

TEMPLATE = """\
{%- macro facts(pairs) %}
{% if pairs %}
<dl>
{% for name, value in pairs %}
<dt>{{ name }}</dt><dd>{{ value }}</dd>
{% endfor %}
</dl>
{% endif %}
{% endmacro %}
{%- macro show(cell) -%}
{% if cell is link %}<td><a href="{{ cell.href }}">{{ cell.text }}</a></td>
{%- else %}<td{% if cell is number %} class="number"{% endif %}>{{ cell }}</td>{% endif %}
{%- endmacro -%}
\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ page.title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
  max-width: 68rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; border-bottom: 1px solid #ccc; }
p { margin: .4rem 0; max-width: 46rem; }
.status { font-weight: 600; color: #9a3400; }
.good { color: #00603f; }
dl { display: grid; grid-template-columns: minmax(8rem, max-content) 1fr; gap: .1rem 1rem;
  margin: .5rem 0; }
dt { color: #555; }
dd { margin: 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem .2rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid #e4e4e4; }
th { border-bottom: 2px solid #888; white-space: nowrap; }
td.number { text-align: right; white-space: nowrap; }
.pictures { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); }
figure { margin: 0; break-inside: avoid; }
.image { grid-column: 1 / -1; }
figure svg, figure img { display: block; width: 100%; height: auto; }
figure svg { max-width: 40rem; }
figcaption { font-size: .85rem; color: #444; max-width: 40rem; }
pre { font-size: .8rem; line-height: 1.35; white-space: pre-wrap; overflow-wrap: anywhere;
  background: #f6f6f6; padding: .7rem; }
a { color: #00508a; }
@media (max-width: 30rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .3rem; } }
@media print { body { max-width: none; padding: 0; font-size: 11pt; } pre { background: none; }
  .wide { overflow: visible; } table { font-size: 7.5pt; }
  h2 { break-after: avoid; } tr { break-inside: avoid; } }
</style>
</head>
<body>
<h1>{{ page.title }}</h1>
<p class="status{{ ' good' if page.good }}">{{ page.status }}</p>
{{- facts(page.facts) }}
{% for section in page.sections %}
<section>
<h2>{{ section.title }}</h2>
{% for note in section.notes %}
<p>{{ note }}</p>
{% endfor %}
{{- facts(section.facts) }}
{% if section.table %}
<div class="wide"><table>
<thead><tr>
{% for name in section.table.head %}<th scope="col">{{ name }}</th>{% endfor %}
</tr></thead>
<tbody>
{% for row in section.table.rows %}
<tr>{% for cell in row %}{{ show(cell) }}{% endfor %}</tr>
{% endfor %}
</tbody>
</table></div>
{% endif %}
{% if section.pictures %}
<div class="pictures">
{% for picture in section.pictures %}
<figure{% if picture.address %} class="image"{% endif %}>
{% if picture.svg %}{{ picture.svg|safe }}{% else %}
<img src="{{ picture.address }}" alt="{{ picture.caption }}">{% endif %}
<figcaption>{{ picture.caption }}</figcaption>
</figure>
{% endfor %}
</div>
{% endif %}
{% if section.text %}
<pre>{{ section.text }}</pre>
{% endif %}
</section>
{% endfor %}
</body>
</html>
"""
