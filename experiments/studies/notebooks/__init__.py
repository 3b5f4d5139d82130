"""Studies: a prediction beside a measurement; percent scripts, that open as notebooks.

``python -m bagua_jax.experiments.studies`` runs them. None is made to be imported.
"""
