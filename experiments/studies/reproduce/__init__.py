"""BAGUA's evaluation, predicted from what our compiled programs send.

``published.json`` holds the public tables, ``counts.json`` what the compiled exchanges
send, ``model`` the equations, ``tables`` the four comparisons, ``page`` their pages.
``what_if`` asks the same of every algorithm on hardware of today.
"""
