"""The report: one page of HTML that needs nothing else, written beside the run that it shows.

page      fills the template; `write_report` is the way in
folder    what folders hold
sections  what each section of the page says of it; `scores` its tiles and tables, `stages` those of stages
words     how values are written
pictures  galleries, and pictures as data URIs
charts, mixture    gauges, curves and share bars as SVG; `series` by what runs are told apart in them
page.html, macros.html, style.css, colours.css, page.js    the template, its looks, and what scripts add; page.md its text
"""
