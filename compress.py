"""The same model in fewer bytes: int8, int4, pruning, distillation."""


def distillation_loss(logits, teacher_logits, temperature: float = 1.0):
    """T² KL(teacher || student) of softmax(logits / T), in nats per token; a scalar (1503.02531, section 2).

    logits, teacher_logits: (..., V). T² keeps the gradient's size the same for every T. None flows to the teacher.
    """
    student, teacher = (x.float() / temperature for x in (logits, teacher_logits.detach()))
    student = student - student.logsumexp(dim=-1, keepdim=True)
    teacher = teacher - teacher.logsumexp(dim=-1, keepdim=True)
    return temperature ** 2 * (teacher.exp() * (teacher - student)).sum(dim=-1).mean()
