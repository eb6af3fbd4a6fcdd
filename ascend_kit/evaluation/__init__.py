"""Does the model still answer correctly? lm-eval over the engine, local data, paired comparison of runs."""
