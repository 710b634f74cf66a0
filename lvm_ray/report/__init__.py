"""The report: one page of HTML that needs nothing else, written beside the run that it shows.

page      reads a folder and fills the template; `write_report` is the way in
pictures  galleries, and pictures as data URIs
charts    gauges, loss curves and share bars as SVG
page.html, style.css    the template and its looks
"""
