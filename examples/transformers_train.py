"""A tiny ViT on scikit-learn's digits, through all three phases, by transformers' Trainer.

python examples/transformers_train.py
torchrun --nproc-per-node=2 examples/transformers_train.py
python examples/transformers_train.py --resume          # from the newest intact checkpoint
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from transformers import AutoModelForImageClassification, TrainingArguments, ViTConfig, ViTForImageClassification

from prelora import PreLoRAConfig
from prelora.integrations.transformers import PreLoRATrainer

TRAIN_SAMPLES = 1024


def digits():
    """1,797 grey 8×8 images, enlarged to 16×16, as the Trainer wants them: a training and a held-out list."""
    pixels, labels = load_digits(return_X_y=True)
    images = F.interpolate(torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 8 - 1, size=16)
    samples = [{"pixel_values": image, "labels": int(label)} for image, label in zip(images, labels, strict=True)]
    return samples[:TRAIN_SAMPLES], samples[TRAIN_SAMPLES:]


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/transformers", help="folder of checkpoints and of the final model")
    parser.add_argument("--resume", action="store_true", help="go on from the newest intact checkpoint")
    options = parser.parse_args()

    args = TrainingArguments(
        output_dir=options.output,
        num_train_epochs=5,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=256,
        gradient_accumulation_steps=2,
        learning_rate=5e-3,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        weight_decay=0.05,
        max_grad_norm=1.0,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        save_total_limit=2,
        disable_tqdm=True,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )
    train, held_out = digits()
    trainer = PreLoRATrainer(
        ViTForImageClassification(
            ViTConfig(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=64,
                image_size=16,
                patch_size=4,
                num_channels=1,
                num_labels=10,
            )
        ),
        args,
        train_dataset=train,
        eval_dataset=held_out,
        compute_metrics=accuracy,
        # A run this short does not converge: the deadline has it switch after epoch 3 at the latest.
        prelora_config=PreLoRAConfig(k=2, m=1, deadline=3, warmup_epochs=1, r_min=2, r_max=8),
    )
    trainer.train(resume_from_checkpoint=options.resume)
    trainer.save_model(f"{options.output}/final")

    if trainer.is_world_process_zero():
        for event in trainer.events:
            print(f"epoch {event.epoch}: {event.phase}, {event.trainable_share:.0%} train; {event.reason}")
        model, found = AutoModelForImageClassification.from_pretrained(
            f"{options.output}/final", output_loading_info=True
        )
        assert not found["missing_keys"]
        assert not found["unexpected_keys"]
        print(f"{options.output}/final is a stock {type(model).__name__}")
    trainer.end()


if __name__ == "__main__":
    main()
