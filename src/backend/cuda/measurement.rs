//! Losses and differences of distributions. They stand in `loss.rs`, codes on the host in `quantize.rs`, under the same
//! names.

use super::Cuda;
use super::tensor::{Activation, Dense, DeviceRows, DeviceSite, Hidden};
use crate::Result;
use crate::backend::{Forward, Measurement, Prediction, Producer};
use crate::quant::rows::QuantizedRows;

impl Measurement for Cuda {
    fn cross_entropy(
        &self,
        x: &Activation,
        head: &Dense,
        tokens: &[u32],
        seq_len: usize,
    ) -> Result<Vec<f64>> {
        self.cross_entropy(x, head, tokens, seq_len)
    }

    fn predict(
        &self,
        x: &Activation,
        head: &Dense,
        targets: &[(u32, u32)],
    ) -> Result<Vec<Prediction>> {
        let (rows, tokens): (Vec<u32>, Vec<u32>) = targets.iter().copied().unzip();
        self.predictions(&self.select_rows(x, &rows)?, head, &tokens)
    }

    fn relative_squared_error(&self, x: &Hidden, original: &Hidden) -> Result<Vec<f64>> {
        self.relative_squared_error(x, original)
    }

    fn kl_divergence(
        &self,
        x: &Activation,
        original: &Activation,
        head: &Dense,
    ) -> Result<Vec<f64>> {
        self.kl_divergence(x, original, head)
    }

    fn fuses(&self, producer: Producer, site: &DeviceSite, tokens: usize) -> bool {
        self.fuses(producer, site, tokens)
    }

    fn fetch_rows(&self, x: &DeviceRows) -> Result<QuantizedRows> {
        self.fetch_rows(x)
    }

    fn restore_rows(&self, x: &QuantizedRows) -> Result<DeviceRows> {
        self.restore_rows(x)
    }
}
