//! A linear layer in float64.

/// `x [rows, inputs]`, `weight [outputs, inputs]`, `bias [outputs]` or nothing, `dy [rows, outputs]`.
pub(in crate::measure) struct Problem {
    pub inputs: usize,
    pub outputs: usize,
    pub x: Vec<f64>,
    pub weight: Vec<f64>,
    pub bias: Vec<f64>,
    pub dy: Vec<f64>,
}

/// The output and the gradients.
pub(in crate::measure) struct Truth {
    pub y: Vec<f64>,
    pub dx: Vec<f64>,
    pub dweight: Vec<f64>,
    pub dbias: Vec<f64>,
}

pub(in crate::measure) fn run(problem: &Problem) -> Truth {
    let Problem { inputs, outputs, x, weight, bias, dy } = problem;
    let mut truth =
        Truth { y: Vec::with_capacity(dy.len()), dx: vec![0.0; x.len()], dweight: vec![0.0; weight.len()], dbias: vec![0.0; *outputs] };
    for ((x, dx), dy) in x.chunks(*inputs).zip(truth.dx.chunks_mut(*inputs)).zip(dy.chunks(*outputs)) {
        for (o, (weight, dweight)) in weight.chunks(*inputs).zip(truth.dweight.chunks_mut(*inputs)).enumerate() {
            let dot: f64 = x.iter().zip(weight).map(|(x, w)| x * w).sum();
            truth.y.push(dot + bias.get(o).copied().unwrap_or(0.0));
            truth.dbias[o] += dy[o];
            for i in 0..*inputs {
                dx[i] += dy[o] * weight[i];
                dweight[i] += dy[o] * x[i];
            }
        }
    }
    truth
}
