"""``python -m bagua_jax.experiments.studies``: run the studies, write their pages."""

import sys

from bagua_jax.experiments import studies

if __name__ == "__main__":
    sys.exit(studies.main())
