"""The two models' colours, everywhere: colour-blind readers tell them apart (Okabe & Ito's palette)."""

CRATE = "#0072B2"
GPT2 = "#D55E00"
