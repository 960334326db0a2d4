// Text that is shown as it is: nothing in it is a tag, a link or a formula.
export default {
  render({ model, el }) {
    const show = () => {
      el.textContent = model.get("value");
      el.classList.toggle("bad", model.get("bad"));
    };
    model.on("change:value change:bad", show);
    show();
  },
};
