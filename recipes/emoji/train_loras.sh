#!/bin/sh
# The LoRAs that fourstroke itself trains: the LCM-LoRA of emoji/xl, and two style LoRAs of emoji/base.
# Run it in recipes/emoji, after train_xl.py and `export.py base xl`.
set -e
COMMON="--batch-size 32 --learning-rate 1e-3 --schedule cosine --betas 0.9 0.99 --ema-decay 0.99 --resolution 128
  --no-buckets --precision bf16 --save-every 100 --cache .cache/train/encoded"

python styles.py --folder noto .cache/data/noto-folder
fourstroke distill emoji/xl --data .cache/data/noto-folder -o .cache/train/xl-lcm \
  --steps 600 --warmup 30 --rank 16 --alpha 8 --guidance 3 6 $COMMON

STYLE="--warmup 20 --rank 8 --min-snr-gamma 5 --caption-dropout 0.1"
for target in to_q to_k to_v to_out.0 proj_in proj_out ff.net.0.proj ff.net.2 conv1 conv2 conv_shortcut \
  downsamplers.0.conv upsamplers.0.conv time_emb_proj; do
  STYLE="$STYLE --target $target"
done
for style in flat line; do
  python styles.py --folder $style .cache/data/$style-folder
  fourstroke train lora emoji/base --data .cache/data/$style-folder -o .cache/train/$style \
    --steps 320 $STYLE $COMMON
done
# Line art is further from the base than flat colours: it goes on.
fourstroke train lora emoji/base --data .cache/data/line-folder -o .cache/train/line-more \
  --init-from .cache/train/line/pytorch_lora_weights.safetensors --steps 420 $STYLE $COMMON
