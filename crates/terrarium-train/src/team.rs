//! Data parallel training: each device has the model and the optimiser, and makes the gradients of its share of a step's rows.
//!
//! A thread per device in one process, sums by NCCL where there is one, as burn-train's own strategy for this has it. That
//! strategy itself is not in reach: the feature that it needs leaves no CPU backend that trains, and it knows neither clipping by the norm
//! of all gradients nor steps that resume exactly. All devices add up the same bits, so their weights stay the same without being sent.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use burn::tensor::{DType, Tensor, TensorData};
use terrarium_kernels::collective::Collective;
use terrarium_kernels::{KernelBackend, TrainBackend};
use terrarium_models::Decoder;

use crate::TrainError;
use crate::data::Batch;
use crate::gradients::Gradients;
use crate::optim::AdamW;
use crate::{loss, params, run};

/// What the first device asks of another.
enum Order {
    /// Gradients of these rows, of `scale` times their summed loss.
    Gradients { share: Vec<Batch>, scale: f64 },
    /// Sum them with those of the others, or send them: of these parameters, whether there are any here or not.
    Sum(Arc<BTreeSet<String>>),
    /// Sums, where devices cannot make them.
    Take(Arc<BTreeMap<String, TensorData>>),
    /// Make the step.
    Update { lr: f64, factor: f64 },
}

/// What another device answers; which fields have something follows from the order.
#[derive(Default)]
struct Answer {
    /// Parameters with a gradient.
    paths: BTreeSet<String>,
    /// Summed loss of each micro-batch.
    losses: Vec<f64>,
    gradients: BTreeMap<String, TensorData>,
}

/// One of the other devices: its thread and the way to it.
struct Mate {
    /// Its place among the devices, from 1.
    number: usize,
    orders: Sender<Order>,
    answers: Receiver<Answer>,
    thread: Option<JoinHandle<()>>,
}

impl Mate {
    fn tell(&mut self, order: Order) -> Result<(), TrainError> {
        self.orders.send(order).map_err(|_| self.lost())
    }

    fn answer(&mut self) -> Result<Answer, TrainError> {
        self.answers.recv().map_err(|_| self.lost())
    }

    /// Why the thread is gone.
    fn lost(&mut self) -> TrainError {
        let reason = match self.thread.take().map(JoinHandle::join) {
            Some(Err(panic)) => run::message(panic),
            _ => "its thread ended".to_string(),
        };
        TrainError::DeviceLost { number: self.number, reason }
    }
}

type Link<B> = Option<Arc<dyn Collective<B>>>;

/// What each device works with.
struct Kit<B: TrainBackend> {
    device: B::Device,
    /// Layers per segment of gradient checkpointing.
    segment: usize,
    /// What sums gradients among the devices, if they can.
    link: Link<B::InnerBackend>,
    /// Elements of each trained parameter.
    sizes: Arc<BTreeMap<String, usize>>,
}

impl<B: TrainBackend> Kit<B> {
    fn gradients(&self, model: &Decoder<B>, share: &[Batch], scale: f64) -> (Gradients<B::InnerBackend>, Vec<Tensor<B::InnerBackend, 1>>) {
        let mut grads = Gradients::default();
        let losses = share.iter().map(|batch| loss::backward(model, batch, scale, self.segment, &mut grads, &self.device)).collect();
        (grads, losses)
    }

    /// Gradients of all of `paths`: zeros where this device's rows gave none.
    fn complete(&self, grads: Gradients<B::InnerBackend>, paths: &BTreeSet<String>) -> BTreeMap<String, Tensor<B::InnerBackend, 1>> {
        let mut tensors = grads.into_tensors();
        for path in paths {
            let size = self.sizes.get(path).copied().unwrap_or(0);
            tensors.entry(path.clone()).or_insert_with(|| Tensor::zeros([size], (&self.device, DType::F32)));
        }
        tensors
    }

    fn sum(
        link: &Arc<dyn Collective<B::InnerBackend>>,
        tensors: BTreeMap<String, Tensor<B::InnerBackend, 1>>,
    ) -> BTreeMap<String, Tensor<B::InnerBackend, 1>> {
        // In the order of the paths, which is the same everywhere.
        let (paths, values): (Vec<_>, Vec<_>) = tensors.into_iter().unzip();
        paths.into_iter().zip(link.sum(values)).collect()
    }

    /// Follows orders until nobody gives any.
    fn serve(self, mut model: Decoder<B>, mut optim: AdamW<B::InnerBackend>, orders: &Receiver<Order>, answers: &Sender<Answer>) {
        let (mut grads, mut losses) = (Gradients::default(), Vec::new());
        while let Ok(order) = orders.recv() {
            let answer = match order {
                Order::Gradients { share, scale } => {
                    (grads, losses) = self.gradients(&model, &share, scale);
                    Answer { paths: grads.paths().map(str::to_string).collect(), ..Answer::default() }
                }
                Order::Sum(paths) => {
                    let mut tensors = self.complete(std::mem::take(&mut grads), &paths);
                    let mut gradients = BTreeMap::new();
                    match &self.link {
                        Some(link) => tensors = Self::sum(link, tensors),
                        None => gradients = std::mem::take(&mut tensors).into_iter().map(|(path, grad)| (path, grad.into_data())).collect(),
                    }
                    grads = Gradients::from_tensors(tensors);
                    Answer { losses: std::mem::take(&mut losses).into_iter().map(loss::scalar).collect(), gradients, ..Answer::default() }
                }
                Order::Take(sums) => {
                    grads = upload::<B::InnerBackend>(&sums, &self.device);
                    continue;
                }
                Order::Update { lr, factor } => {
                    model = optim.step(model, std::mem::take(&mut grads), lr, factor);
                    continue;
                }
            };
            if answers.send(answer).is_err() {
                return;
            }
        }
    }
}

/// All devices of a run, seen from the first.
pub(crate) struct Team<B: TrainBackend> {
    kit: Kit<B>,
    mates: Vec<Mate>,
}

impl<B: TrainBackend> Team<B> {
    /// Gives each of `others` the model and the optimiser.
    pub fn gather(
        model: &Decoder<B>,
        optim: &AdamW<B::InnerBackend>,
        device: &B::Device,
        others: &[B::Device],
        segment: usize,
    ) -> Result<Self, TrainError> {
        let all: Vec<B::Device> = std::iter::once(device).chain(others).cloned().collect();
        let link = if others.is_empty() { None } else { B::InnerBackend::collective(&all) };
        let trained = params::list(model).into_iter().filter(|param| param.trained);
        let sizes: Arc<BTreeMap<String, usize>> = Arc::new(trained.map(|param| (param.path.clone(), param.len())).collect());
        let kit = |device: &B::Device| Kit { device: device.clone(), segment, link: link.clone(), sizes: sizes.clone() };
        let mut mates = Vec::new();
        for (at, other) in others.iter().enumerate() {
            let (orders, received) = channel();
            let (send, answers) = channel();
            let (kit, model, optim) = (kit(other), model.clone(), optim.clone());
            let work = move || {
                let (model, optim) = (params::copied_to(model, &kit.device), optim.copied_to(&kit.device));
                if send.send(Answer::default()).is_ok() {
                    kit.serve(model, optim, &received, &send);
                }
            };
            let thread = std::thread::Builder::new().name(format!("device {}", at + 2)).spawn(work);
            let number = at + 2;
            let thread = thread.map_err(|error| TrainError::DeviceLost { number, reason: error.to_string() })?;
            mates.push(Mate { number, orders, answers, thread: Some(thread) });
        }
        // Until all have their own copies: the first device changes its weights in place.
        for mate in &mut mates {
            mate.answer()?;
        }
        Ok(Self { kit: kit(device), mates })
    }

    /// Devices.
    pub fn size(&self) -> usize {
        1 + self.mates.len()
    }

    /// Gradients of `scale` times the summed loss of `shares`, one per device, each of the same number of micro-batches; and the summed loss of
    /// each micro-batch, device by device.
    pub fn gradients(
        &mut self,
        model: &Decoder<B>,
        shares: Vec<Vec<Batch>>,
        scale: f64,
    ) -> Result<(Gradients<B::InnerBackend>, Vec<f64>), TrainError> {
        let mut shares = shares.into_iter();
        let own = shares.next().unwrap_or_default();
        for (mate, share) in self.mates.iter_mut().zip(shares) {
            mate.tell(Order::Gradients { share, scale })?;
        }
        let (mut grads, losses) = self.kit.gradients(model, &own, scale);
        let read = |losses: Vec<Tensor<B::InnerBackend, 1>>| losses.into_iter().map(loss::scalar).collect::<Vec<f64>>();
        if self.mates.is_empty() {
            return Ok((grads, read(losses)));
        }
        let mut paths: BTreeSet<String> = grads.paths().map(str::to_string).collect();
        // Nobody begins to sum before all have something to sum: a device that is lost before is noticed here, not waited for.
        for mate in &mut self.mates {
            paths.extend(mate.answer()?.paths);
        }
        let paths = Arc::new(paths);
        for mate in &mut self.mates {
            mate.tell(Order::Sum(paths.clone()))?;
        }
        let tensors = self.kit.complete(grads, &paths);
        let mut losses = losses;
        let found = match &self.kit.link {
            Some(link) => {
                grads = Gradients::from_tensors(Kit::<B>::sum(link, tensors));
                let mut found = read(std::mem::take(&mut losses));
                for mate in &mut self.mates {
                    found.extend(mate.answer()?.losses);
                }
                found
            }
            None => {
                let mut found = read(std::mem::take(&mut losses));
                let mut sums: BTreeMap<String, Vec<f32>> =
                    tensors.into_iter().map(|(path, grad)| (path, values(grad.into_data()))).collect();
                for mate in &mut self.mates {
                    let answer = mate.answer()?;
                    found.extend(answer.losses);
                    for (path, data) in answer.gradients {
                        if let Some(sum) = sums.get_mut(&path) {
                            sum.iter_mut().zip(values(data)).for_each(|(sum, value)| *sum += value);
                        }
                    }
                }
                let data = |(path, sum): (String, Vec<f32>)| (path, TensorData::new(sum.clone(), [sum.len()]));
                let sums: Arc<BTreeMap<String, TensorData>> = Arc::new(sums.into_iter().map(data).collect());
                for mate in &mut self.mates {
                    mate.tell(Order::Take(sums.clone()))?;
                }
                grads = upload(&sums, &self.kit.device);
                found
            }
        };
        Ok((grads, found))
    }

    /// Makes the step on the other devices.
    pub fn update(&mut self, lr: f64, factor: f64) -> Result<(), TrainError> {
        self.mates.iter_mut().try_for_each(|mate| mate.tell(Order::Update { lr, factor }))
    }
}

fn values(data: TensorData) -> Vec<f32> {
    data.iter::<f32>().collect()
}

fn upload<B: KernelBackend>(sums: &BTreeMap<String, TensorData>, device: &B::Device) -> Gradients<B> {
    let tensor = |(path, data): (&String, &TensorData)| (path.clone(), Tensor::from_data(data.clone(), (device, DType::F32)));
    Gradients::from_tensors(sums.iter().map(tensor).collect())
}

/// `rows` in `parts` runs of about equal length, none empty where there are enough.
pub(crate) fn split<T>(rows: &[T], parts: usize) -> impl Iterator<Item = &[T]> {
    (0..parts).map(move |part| &rows[rows.len() * part / parts..rows.len() * (part + 1) / parts])
}

#[cfg(test)]
mod tests {
    use burn::backend::Autodiff;
    use terrarium_kernels::backend::CpuBackend;
    use terrarium_models::DecoderConfig;

    use super::*;
    use crate::optim::AdamWConfig;

    type Cpu = Autodiff<CpuBackend>;

    fn batch(id: i32, labelled: bool) -> Batch {
        let labels = if labelled { vec![3; 4] } else { vec![crate::data::IGNORED; 4] };
        Batch { rows: 1, length: 4, ids: vec![id; 4], labels, documents: vec![0; 4] }
    }

    fn team(others: usize) -> (Decoder<Cpu>, Team<Cpu>) {
        let table = r#"{"model_type": "mamba2", "vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_heads": 2, "head_dim": 8,
            "state_size": 4, "n_groups": 1, "expand": 2, "chunk_size": 4}"#;
        let model = Decoder::init(&DecoderConfig::from_json(table).unwrap(), 1, &Default::default());
        let optim = AdamW::new(AdamWConfig { betas: [0.9, 0.99], eps: 1e-8, weight_decay: 0.1 });
        let team = Team::gather(&model, &optim, &Default::default(), &vec![Default::default(); others], 0).unwrap();
        (model, team)
    }

    #[test]
    fn a_device_without_labels_adds_nothing() {
        let (model, mut team) = team(2);
        let (alone, mut one) = self::team(0);
        let (_, losses) = team.gradients(&model, vec![vec![batch(1, true)], vec![batch(2, false)], vec![batch(3, true)]], 0.5).unwrap();
        let (_, expected) = one.gradients(&alone, vec![vec![batch(1, true), batch(3, true)]], 0.5).unwrap();
        assert_eq!(losses, [expected[0], 0.0, expected[1]]);
        let (grads, _) = team.gradients(&model, vec![vec![batch(2, false)], vec![batch(1, true)], vec![batch(2, false)]], 0.5).unwrap();
        let (expected, _) = one.gradients(&alone, vec![vec![batch(1, true)]], 0.5).unwrap();
        assert_eq!(grads.paths().collect::<Vec<_>>(), expected.paths().collect::<Vec<_>>());
        for path in expected.paths() {
            assert_eq!(grads.get(path).unwrap().to_data(), expected.get(path).unwrap().to_data(), "{path}");
        }
    }

    #[test]
    fn a_device_that_stops_is_named() {
        let (model, mut team) = team(2);
        // An id beyond the vocabulary: a panic on that device's thread.
        let shares = vec![vec![batch(1, true)], vec![batch(1, true)], vec![batch(99, true)]];
        let Err(error) = team.gradients(&model, shares, 1.0) else { panic!("the id was taken") };
        assert!(matches!(&error, TrainError::DeviceLost { number: 3, reason } if !reason.is_empty()), "{error}");
        assert!(error.to_string().contains("--resume auto"));
    }

    #[test]
    fn shares_differ_by_one_row_at_most_and_hold_every_row_once() {
        let rows: Vec<usize> = (0..10).collect();
        for parts in 1..=10 {
            let shares: Vec<&[usize]> = split(&rows, parts).collect();
            assert_eq!(shares.concat(), rows);
            let lengths = || shares.iter().map(|share| share.len());
            assert!(lengths().max().unwrap() - lengths().min().unwrap() <= 1 && lengths().min().unwrap() > 0);
        }
    }
}
