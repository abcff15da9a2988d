"""SEPS: patches chosen by a sparse and a dense text, merged per pair of picture and text, scored by their best matches.

SEPS is arXiv 2511.01390 v1; LAPS is what it grew from. Two systems go by the one name, the paper's and the released
code's, and the published figures come with the code. `seps.variant` says which is built; *ours* is what neither states.

                code (released)                                 paper
    score       cosine with the picture's mean                  (1 - 2 beta) s_p + beta (s_st + s_dt + 2 s_im); s_p by
                + cosine with the mean of a text                an MLP, the others products with the means, min-max
    beta        -                                               0.25 (ours: the source has no value)
    s_p         -                                               sigmoid of d -> d / 4 -> 1, GELU (sizes ours)
    texts       a selection by each, their scores added         one score by both, two decisions
    decision    the best ceil(rho N)                            in training drawn for each pair and token, straight
                                                                through, by Gumbel-softmax at temperature 1, with
                                                                probability s / its greatest value; else the best
                                                                ceil(rho N) (all of this ours)
    merging     one network for both texts,                     a network for each text, their outputs added
                int(N aggr rho) vectors                         (sizes as in the code: ours)
    also there  [CLS]; the mean of the dropped tokens,          -
                weighted by softmax of their scores
    similarity  leaky ReLU (0.1) of cosines;                    of cosines with the sparse words; to each mean is
                mean of the best matches, both ways             added an MLP of the 5 best matches, 5 -> 10 -> 1,
                                                                GELU, one each way, 0 where fewer (sizes ours)
    ratio loss  a constant, as the share is kept by             (rho - mean of the decisions)^2; published with the
                construction: 0 unless `seps.ratio_weight`      sum of both texts' means, which can't be met
                asks for it                                     (`seps.ratio_sum`)

The traps of the release are switches, and off: `seps.select_gradient: false` cuts the gradient at the chosen tokens, so
that the vision tower learns through [CLS] alone, or not at all; `train.nan_as_zero`; `data.eval_split: test` picks the
epoch on the test split.

Dense text (`seps.dense`) has three modes. `query`: a text brings the description of *its own picture* along, as
published; at test that describes the answer, a leak, and whatever shows it says so. `image`: a candidate's own
description, known when it is indexed, chooses its tokens, which are compared with the words of the caption (in `code`
by a second selection whose score is added). `none`. Whose dense text belongs to a pair that does not match, the paper
leaves open: both readings are here.
"""
