"""Write prompts.parquet, the demo's prompt manifest. Run: python assets/samples/make_prompts.py."""

from pathlib import Path

from schemas.rows import Prompt
from schemas.tables import PROMPTS, write_table

STORIES = [
    Prompt(
        prompt_id="bird-and-bull",
        prompts=[
            "Actor1, a purple bird with an orange beak, wakes on a brown branch.",
            "Actor2, a white bull with a red scarf, crosses a green meadow.",
            "Actor1 and Actor2 share a red apple under a blue sky.",
        ],
        seed=1,
    ),
    Prompt(
        prompt_id="sailor-at-sea",
        prompts=[
            "Actor1, a sailor in a green shirt, rows a brown boat on a grey sea.",
            "A huge dark purple bird circles above Actor1 under a pale sky.",
            "Actor1 climbs a red rock and waves at the dark bird.",
        ],
        seed=2,
    ),
    Prompt(
        prompt_id="girl-and-dragon",
        prompts=[
            "Actor1, a girl with red hair, walks through white snow.",
            "Actor1 finds a small dragon by an orange fire.",
            "The dragon flies off through a golden sky with orange clouds.",
        ],
        seed=3,
        extend_prompts=["Actor1 waves at the dragon from brown ruins at an orange sunset."],
    ),
]

if __name__ == "__main__":
    write_table(Path(__file__).with_name("prompts.parquet"), PROMPTS, STORIES)
