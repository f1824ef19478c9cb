"""The paper's Appendix D: which classes pay for weight decay in image classification."""
