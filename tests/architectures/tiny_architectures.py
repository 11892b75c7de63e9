"""The table of architectures: one row for each, in families."""

from architecture import Architecture
from decoders import DECODERS, STATES
from encoders import ENCODER_DECODERS, ENCODERS
from mixtures import MIXTURES
from perception import SPEECH_MODELS, VISION

FAMILIES: dict[str, dict[str, Architecture]] = {
    "Decoders": DECODERS,
    "States instead of, or beside, attention": STATES,
    "Mixtures of experts": MIXTURES,
    "Encoders": ENCODERS,
    "Encoder-decoders": ENCODER_DECODERS,
    "Vision, and vision with text": VISION,
    "Speech": SPEECH_MODELS,
}
TABLE = {name: row for family in FAMILIES.values() for name, row in family.items()}
ARCHITECTURES = {name: row for name, row in TABLE.items() if row.sparse}
REFUSED = {name: row for name, row in TABLE.items() if row.refused}
