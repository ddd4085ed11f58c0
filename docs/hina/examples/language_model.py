"""A language model: a small transformer learns to continue the project's own README, by letters.

    python docs/hina/examples/language_model.py

What is meant for pictures is off: neighbouring rows of a weight are no neighbours in a text.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

import torch
from torch import Tensor, nn

from library.automagic_cameamp_refactored import OptimizerConfig, RefactoredAutomagicCameAMP

ROOT = Path(__file__).parents[3]
STEPS, LENGTH, WIDTH = 150, 64, 64


class LanguageModel(nn.Module):
    def __init__(self, letters: int) -> None:
        super().__init__()
        self.letters = nn.Embedding(letters, WIDTH)
        self.places = nn.Embedding(LENGTH, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, letters)

    def forward(self, text: Tensor) -> Tensor:
        x = self.letters(text) + self.places(torch.arange(LENGTH))
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        return self.head(self.body(x, mask=mask, is_causal=True))


def main() -> None:
    torch.set_num_threads(1)  # tensors as small as these gain nothing from a second
    torch.manual_seed(0)
    text = (ROOT / "README.md").read_text("utf-8")
    alphabet = {letter: k for k, letter in enumerate(sorted(set(text)))}
    codes = torch.tensor([alphabet[letter] for letter in text])
    model = LanguageModel(len(alphabet))
    config = OptimizerConfig(
        lr=1e-3,
        max_lr=1e-2,
        lr_bump=3e-5,
        warmup_steps=100,  # of a real run a thousand or more
        full_finetune=True,
        lora_rank_penalty=True,
        edge_suppression=False,
        spatial_awareness=False,
        background_regularization=False,
        frequency_penalty=0.0,
    )
    optimizer = RefactoredAutomagicCameAMP(model.named_parameters(), config)
    losses = []
    for step in range(STEPS):
        starts = torch.randint(len(codes) - LENGTH - 1, (16,))
        windows = torch.stack([codes[k : k + LENGTH + 1] for k in starts])
        logits = model(windows[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 25 == 0 or step == STEPS - 1:
            print(f"step {step + 1:4} ({optimizer.phase}): {losses[-1]:.3f} nats a letter")
    print(f"{losses[0]:.2f} -> {losses[-1]:.2f} nats a letter")
    if not losses[-1] < 0.8 * losses[0]:
        sys.exit("The model has not learned to continue the text.")


if __name__ == "__main__":
    main()
