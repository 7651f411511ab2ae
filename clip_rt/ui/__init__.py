"""A page for people, over the gateway's own API: classify, search, thresholds, compare.

`server` runs the gateway's application with what the page needs beside it; `static/` is the page,
plain HTML, CSS and JavaScript.
"""
