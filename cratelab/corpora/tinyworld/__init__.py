"""TinyWorld: generated text whose every token carries what it means and how likely it was.

Seven domains (stories, dialogue, counting, biology, law, markets, code) in fewer than 512 words. A document starts with
``<begin>`` and ends with ``<end>``; between them stand a title, an opening that tells facts (names, a secret word, a
price, the value of a variable), body sentences, which may recall facts or replace them, and a closing, which recalls
some.
Documents are short, medium or as long as the context, so the facts return after known distances up to all of it.

Domain, topic, length and, until a sentence tells, the sense of a word are hidden. `World.log_prob` sums over all of
them: no model that sees a document from its start can expect less loss than `World.entropy_rate`.
"""

from cratelab.corpora.tinyworld.world import World, generate, log_prob, vocabulary

__all__ = ["World", "generate", "log_prob", "vocabulary"]
