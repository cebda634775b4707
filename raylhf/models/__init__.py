"""Language models: the only importer of transformers and peft."""

import transformers.utils

# Where scikit-learn is installed (a reward rule needs it), transformers imports it in every process for a threshold of
# assisted generation, which nothing here uses: 0.7 s of processor time each. It asks this function whether it may.
transformers.utils.is_sklearn_available = lambda: False
