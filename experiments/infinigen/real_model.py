"""InfiniGen on a real language model: what each step between the published guess and the truth loses, and what a token read is worth.

    python -m experiments.infinigen.real_model --model=smollm2-135m --output_dir=experiments/results/infinigen_real

Two parts, either alone by --part:

  layers    layer by layer, on queries, keys and attention inputs of whole rows of prose: the attention that a fixed number of tokens
            misses where they are chosen by the true logits, by all columns of guessed queries, by some columns, joined and corrected in
            several ways. Nothing is decoded, so no layer sees another's loss.
  frontier  decoded, teacher-forced: the divergence from the full cache's predictions against tokens read and bytes moved, for the
            published rule, the steps from it to today's, exact top-k, H2O.

The text is prose of `pydoc_data.topics`; calibration sees what it sees by default, Python source. Rows of records.jsonl that exist are not
measured again.
"""

from absl import flags

FLAGS = flags.FLAGS
PAPER = "infinigen_paper"
FRONTIER = (
    "oracle_topk(k=0.05)", "oracle_topk(k=0.1)", "oracle_topk(k=0.2)", "h2o(heavy=0.1,recent=0.1)", "streaming(sinks=4,window=0.2)",
    "infinigen(alpha=4,partial=0.3,budget=0.2,sinks=0,recent=0,group=max,columns=sum,correction=False)",
    "infinigen(alpha=inf,partial=0.3,budget=0.2,sinks=0,recent=0,group=max,columns=sum,correction=False)",
    "infinigen(alpha=4,partial=0.3,budget=0.2,group=max,columns=sum,correction=False)",
    "infinigen(alpha=5,partial=0.3,budget=0.2,group=max,columns=sum,correction=False)",
    "infinigen(alpha=inf,partial=0.3,budget=0.2,group=max,columns=sum,correction=False)",
    "infinigen(alpha=8.5,partial=0.3,budget=0.3,group=mass,columns=sum,correction=False)",
    "infinigen(alpha=8.5,partial=0.3,budget=0.3,group=mass,columns=sum,correction=True)",
    "infinigen(alpha=8.5,partial=0.3,budget=0.3,group=mass,columns=product,correction=True)",
    "infinigen(alpha=8.5,partial=0.3,budget=0.2,group=mass,columns=product,correction=True)",
    "infinigen(alpha=8,partial=0.3,budget=0.3,group=mass,columns=product,correction=True)",
    "infinigen(alpha=7,partial=0.3,budget=0.3,group=mass,columns=product,correction=True)",
    "infinigen(alpha=6,partial=0.3,budget=0.3,group=mass,columns=product,correction=True)",
    "infinigen(alpha=8.5,partial=0.5,budget=0.3,group=mass,columns=product,correction=True)",
    "infinigen(alpha=8.5,partial=1.0,budget=0.3,group=mass,columns=product,correction=True)",
)  # fmt: skip
