"""The report: one page of HTML that needs nothing else, written beside the run that it shows.

page      fills the template; `write_report` is the way in
folder    what a folder holds
sections  what each section of the page says of it
words     how values are written
pictures  galleries, and pictures as data URIs
charts, mixture    gauges, loss curves and share bars as SVG
page.html, style.css    the template and its looks
"""
