"""Fast ways to compute a Kuramoto layer that give the results of kuramoto.py; the choice between them is made above."""
