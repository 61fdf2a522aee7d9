//! Pixels in memory, with text.

use std::convert::Infallible;

use embedded_graphics::mono_font::{MonoFont, MonoTextStyle};
use embedded_graphics::pixelcolor::Rgb888;
use embedded_graphics::prelude::{
    Dimensions, DrawTarget, Drawable, OriginDimensions, Pixel, Point, RgbColor, Size,
};
use embedded_graphics::text::{Baseline, Text};

use super::palette::Rgb;
use vellum_base::error::{Error, ErrorKind, Result};

/// An image of 8 bits a channel.
#[derive(Debug)]
pub(super) struct Canvas {
    width: usize,
    height: usize,
    pixels: Vec<u8>,
}

impl Canvas {
    pub(super) fn new(width: usize, height: usize, background: Rgb) -> Self {
        let Rgb(red, green, blue) = background;
        Canvas {
            width,
            height,
            pixels: [red, green, blue].repeat(width * height),
        }
    }

    /// Fills a rectangle; what lies outside is left out.
    pub(super) fn fill(&mut self, x: usize, y: usize, width: usize, height: usize, colour: Rgb) {
        for y in y..y + height {
            for x in x..x + width {
                self.set(x, y, colour);
            }
        }
    }

    #[expect(
        clippy::indexing_slicing,
        reason = "there are three bytes for each pixel of the rectangle"
    )]
    fn set(&mut self, x: usize, y: usize, Rgb(red, green, blue): Rgb) {
        if x < self.width && y < self.height {
            let at = (y * self.width + x) * 3;
            self.pixels[at..at + 3].copy_from_slice(&[red, green, blue]);
        }
    }

    /// Writes one line; characters that the font lacks become `?`.
    pub(super) fn text(
        &mut self,
        x: usize,
        y: usize,
        font: &MonoFont<'_>,
        colour: Rgb,
        text: &str,
    ) {
        let Rgb(red, green, blue) = colour;
        let style = MonoTextStyle::new(font, Rgb888::new(red, green, blue));
        let place = Point::new(x as i32, y as i32);
        // Drawing on a canvas cannot fail.
        let _ = Text::with_baseline(text, place, style, Baseline::Top).draw(self);
    }

    /// The image as a PNG file.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for an image without pixels.
    pub(super) fn encode(&self) -> Result<Vec<u8>> {
        let failed = |error: png::EncodingError| {
            Error::with_source(ErrorKind::InvalidInput, "a picture that cannot be", error)
        };
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, self.width as u32, self.height as u32);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        let mut writer = encoder.write_header().map_err(failed)?;
        writer.write_image_data(&self.pixels).map_err(failed)?;
        writer.finish().map_err(failed)?;
        Ok(bytes)
    }
}

impl OriginDimensions for Canvas {
    fn size(&self) -> Size {
        Size::new(self.width as u32, self.height as u32)
    }
}

impl DrawTarget for Canvas {
    type Color = Rgb888;
    type Error = Infallible;

    fn draw_iter<I>(&mut self, pixels: I) -> std::result::Result<(), Infallible>
    where
        I: IntoIterator<Item = Pixel<Rgb888>>,
    {
        let inside = self.bounding_box();
        for Pixel(point, colour) in pixels {
            if inside.contains(point) {
                let colour = Rgb(colour.r(), colour.g(), colour.b());
                self.set(point.x as usize, point.y as usize, colour);
            }
        }
        Ok(())
    }
}
