"""The bundled model of clip_rt, and drawings to try it on; its README is the model card.

`clip_rt.Client()` serves `model_repository/` of this package where no server and no repository is
named; `python -m training.run --sample` learns from `sample/`.
"""

from pathlib import Path

EXAMPLES = Path(__file__).with_name("images")
"""A folder of six drawings: bicycle, guitar, owl, pizza, rocket and umbrella, each a .png."""
